"""ViTs whose weights are quantized, offloaded, or on the meta device."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from timm import layers
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft._self_check import check_block, gradient_gap
from lpt_peft.errors import BackboneError, StateError
from tests.backbones.models import images, make, wrap
from tests.versions import skip_unless

VITS = ["timm ViT", "transformers ViT classifier", "torchvision"]


def dynamic_int8(model: nn.Module) -> nn.Module:
    """torch.ao: packed integer weights, and activations rounded in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao_int8(config: str):
    def quantize(model: nn.Module) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return quantize


QUANTIZED = {
    "torch.ao dynamic": dynamic_int8,
    "torchao weight-only": torchao_int8("Int8WeightOnlyConfig"),
    "torchao dynamic": torchao_int8("Int8DynamicActivationInt8WeightConfig"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("row", VITS)
def test_quantized_before_wrap(row, kind):
    """The features are close to those of the ViT before quantization, and prompts have an effect."""
    plain = make(row)
    quantized = wrap(QUANTIZED[kind](copy.deepcopy(plain))).eval()
    full = wrap(plain).eval()
    for phase in ("shared", "group"):
        full.phase = quantized.phase = phase
        with torch.no_grad():
            expected, got = full.features(images(4)), quantized.features(images(4))
            full.shared.prompts.mul_(-1)
            effect = (full.features(images(4)) - expected).norm()
            full.shared.prompts.mul_(-1)
        assert (got - expected).norm() < 0.3 * expected.norm()
        assert (got - expected).norm() < 0.5 * effect
    assert len(quantized.fingerprint) == 64
    assert quantized.fingerprint != full.fingerprint
    again = wrap(QUANTIZED[kind](make(row)))
    assert again.fingerprint == quantized.fingerprint, "of the quantized values, which are the same"
    assert quantized.unwrap()(images(1)) is not None


@pytest.mark.parametrize("row", VITS)
def test_weight_only_quantization_lets_gradients_through(row):
    plain = make(row)
    gradients = []
    for model in (copy.deepcopy(plain), QUANTIZED["torchao weight-only"](copy.deepcopy(plain))):
        adapter = wrap(model).train()
        adapter(images(4)).square().sum().backward()
        gradients.append(adapter.shared.prompts.grad)
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("row", VITS)
def test_training_without_gradients_is_refused(row):
    adapter = wrap(dynamic_int8(make(row))).train()
    with pytest.raises(StateError, match=r"cannot be trained.*no gradient passes Linear of torch\.ao.*inference"):
        adapter(images())
    with torch.no_grad():
        adapter(images())
    assert adapter.eval()(images()).shape == (2, 5)


def test_only_quantized_blocks_are_checked_for_gradients():
    adapter = wrap(make("timm ViT"))
    assert gradient_gap(adapter.backbone.blocks[0], adapter.backbone.dim) is None


def test_self_check_of_quantized_blocks(monkeypatch):
    """With their own weights, because integers cannot be drawn at random."""
    model = QUANTIZED["torch.ao dynamic"](make("timm ViT"))
    adapter = wrap(model)
    block = adapter.backbone.blocks[0]
    check_block(block, type(block).original, 48)
    monkeypatch.setattr("lpt_peft._prompted._append", lambda tokens, prompt, axis=1: tokens)
    with pytest.raises(BackboneError, match="difference to token concatenation"):
        check_block(block, type(block).original, 48)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("row", ["timm ViT", "torchvision", "open_clip"])
def test_offloading_is_refused_unless_the_models_forward_runs(row, order):
    accelerate = pytest.importorskip("accelerate")
    model = make(row)
    words = r"is offloaded by accelerate.*remove_hook_from_submodules"
    if order == "before":
        accelerate.cpu_offload(model, torch.device("cpu"))
        with pytest.raises(BackboneError, match=words):
            wrap(model)
        return
    adapter = wrap(model).eval()
    expected = adapter(images())
    accelerate.cpu_offload(adapter.vit, torch.device("cpu"))
    with pytest.raises(BackboneError, match=words):
        adapter(images())
    accelerate.hooks.remove_hook_from_submodules(adapter.vit)
    assert torch.equal(adapter(images()), expected)


@pytest.mark.parametrize("whole", [False, True], ids=["the ViT", "the adapter"])
def test_transformers_models_can_be_offloaded_after_wrap(whole):
    accelerate = pytest.importorskip("accelerate")
    adapter = wrap(make("transformers ViT classifier")).eval()
    adapter.phase = "group"
    expected = adapter(images())
    accelerate.cpu_offload(adapter if whole else adapter.vit, torch.device("cpu"))
    assert next(adapter.vit.parameters()).is_meta
    assert torch.equal(adapter(images()), expected)
    with pytest.raises(StateError, match=r"meta device.*fingerprint.*remove_hook_from_submodules"):
        _ = adapter.fingerprint


def test_transformers_encoders_can_be_offloaded_before_wrap_and_classifiers_cannot():
    accelerate = pytest.importorskip("accelerate")
    for row, refused in (("transformers DINOv3", False), ("transformers ViT classifier", True)):
        expected = wrap(make(row)).eval()(images())
        model = make(row)
        accelerate.cpu_offload(model, torch.device("cpu"))
        if refused:
            with pytest.raises(BackboneError, match=r"Linear was replaced on the object.*offload it .*afterwards"):
                wrap(model)
            continue
        adapter = wrap(model).eval()
        assert adapter.shared.prompts.device.type == "cpu"
        assert torch.equal(adapter(images()), expected)


def test_a_meta_model_is_wrapped_and_loaded_later():
    skip_unless(hasattr(layers, "calculate_drop_path_rates"), "models on the meta device")
    expected = wrap(make("timm ViT")).eval()
    with torch.device("meta"):
        adapter = LongTailPromptAdapter.wrap(
            copy.deepcopy(make("timm ViT")).to("meta"), 5, prompt_length=3, pool_size=4, query="final"
        )
    with pytest.raises(StateError, match="meta device"):
        _ = adapter.fingerprint
    adapter.to_empty(device="cpu")
    adapter.load_state_dict(expected.state_dict())
    assert torch.equal(adapter.eval()(images()), expected(images()))
