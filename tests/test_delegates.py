"""Tools of timm and PEFT on an adapter, and the plain model through the adapter."""

from __future__ import annotations

import threading

import pytest
import timm
import torch
from timm.data import resolve_data_config, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import nn

from lpt_peft import AdapterOutput, CosineClassifier, LongTailPromptAdapter
from lpt_peft.errors import InputError, StateError
from tests.backbones.models import ROWS, build, images, make, rows

TIMM = ("set_grad_checkpointing",)
TRANSFORMERS = ("config", "gradient_checkpointing_enable", "gradient_checkpointing_disable", "main_input_name")


def small(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, img_size=32, patch_size=8, depth=2, num_classes=7, **options).eval()


# Delegates


@rows
def test_delegates_exist_if_the_model_has_them(row):
    vit = make(row)
    adapter = LongTailPromptAdapter.wrap(vit, 5)
    for name in (*TIMM, *TRANSFORMERS):
        assert hasattr(adapter, name) == hasattr(vit, name), name
    assert adapter.num_classes == 5
    assert adapter.num_features == adapter.features(images()).shape[1]
    assert adapter.get_classifier() is adapter.head
    assert isinstance(adapter.get_classifier(), CosineClassifier)
    first = next(vit.parameters())
    assert (adapter.device, adapter.dtype) == (first.device, first.dtype)
    for name in ("forward_features", "forward_head", "forward_intermediates", "blocks", "patch_embed", "nonsense"):
        assert not hasattr(adapter, name), name


def test_errors_of_missing_attributes():
    adapter = LongTailPromptAdapter.wrap(small(), 5)
    with pytest.raises(AttributeError, match=r"LongTailPromptAdapter\.config .* a VisionTransformer, has no config"):
        _ = adapter.config
    with pytest.raises(AttributeError, match=r"forward_features.*without prompts.*adapter\.features\(images\)"):
        _ = adapter.forward_features
    adapter.unwrap()
    with pytest.raises(AttributeError, match=r"device comes from the wrapped model; this adapter was unwrapped"):
        _ = adapter.device


@rows
def test_grad_checkpointing_is_set_through_the_adapter(row):
    adapter, calls = build(row).train(), []
    for block in adapter.backbone.blocks:
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda *_: calls.append(1))
    adapter(images()).sum().backward()
    plain = len(calls)
    calls.clear()
    if hasattr(adapter, "set_grad_checkpointing"):
        adapter.set_grad_checkpointing(True)
    elif hasattr(adapter, "gradient_checkpointing_enable"):
        adapter.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        assert ROWS[row].checkpointing is None
        return
    adapter(images()).sum().backward()
    assert len(calls) > plain, "the backward pass did not recompute blocks"


# timm


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.augreg_in21k", "vit_base_patch16_clip_224.openai", "beit_base_patch16_224"]
)
@pytest.mark.parametrize("resolve", [resolve_data_config, resolve_model_data_config])
def test_timm_reads_the_data_configuration(name, resolve):
    vit = small(name)
    expected = resolve(model=vit)
    assert resolve(model=LongTailPromptAdapter.wrap(vit)) == expected
    assert expected["mean"] != timm.data.IMAGENET_DEFAULT_MEAN


@rows
def test_data_configuration_of_other_libraries(row):
    adapter = build(row)
    config = resolve_model_data_config(adapter)
    expected = adapter.backbone.preprocess()
    assert list(config["mean"]) == expected["mean"]
    assert list(config["std"]) == expected["std"]
    assert config["interpolation"] == expected["interpolation"]
    if "pretrained_cfg" not in vars(adapter.vit):
        assert list(config["input_size"]) == expected["input_size"]


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_timm_optimizer_factory(phase):
    vit = small()
    adapter = LongTailPromptAdapter.wrap(vit)
    adapter.phase = phase
    assert adapter.no_weight_decay() == {f"vit.{name}" for name in vit.no_weight_decay()} != set()
    optimizer = create_optimizer_v2(adapter, "adamw", lr=0.1, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 for p in adapter.trainable_parameters()}
    vit.pos_embed.requires_grad_(True)  # a user who also trains the position embedding
    optimizer = create_optimizer_v2(adapter, "adamw", lr=0.1, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(vit.pos_embed)] == 0.0


def test_head_init_scale():
    """As timm's train.py does for --head-init-scale."""
    adapter = LongTailPromptAdapter.wrap(small())
    before = adapter.head.weight.detach().clone()
    with torch.no_grad():
        adapter.get_classifier().weight.mul_(0.5)
    assert torch.equal(adapter.head.weight, before * 0.5)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_another_pooling_after_wrap_is_refused(phase):
    vit = small()
    adapter = LongTailPromptAdapter.wrap(vit)
    adapter.phase = phase
    expected = adapter(images())
    vit.reset_classifier(0)  # the adapter does not use that head
    assert torch.equal(adapter(images()), expected)
    vit.reset_classifier(0, "avg")
    for call in (adapter, adapter.features):
        with pytest.raises(StateError, match=r"pooled by 'token' when it was wrapped, and by 'avg' now.*wrap"):
            call(images())
    vit.reset_classifier(3, "token")
    assert torch.equal(adapter(images()), expected)
    vit.reset_classifier(0, "avg")
    assert adapter.unwrap() is vit
    LongTailPromptAdapter.wrap(vit, 7)(images())


def test_another_pooling_in_a_timm_tower_of_open_clip_is_refused():
    adapter = build("open_clip, timm tower")
    adapter(images())
    adapter.vit.visual.trunk.global_pool = "avg"
    with pytest.raises(StateError, match="pooled by"):
        adapter(images())


# PEFT's habits


@rows
@pytest.mark.parametrize("phase", ["shared", "group"])
def test_disable_adapter_equals_the_plain_model(row, phase):
    vit = make(row)
    with torch.no_grad():
        expected = vit(images())
    adapter = LongTailPromptAdapter.wrap(vit, 5).eval()
    adapter.phase = phase
    prompted = adapter(images())
    with torch.no_grad(), adapter.disable_adapter():
        got, plain = adapter(images()), adapter.vit(images())
    assert type(got) is type(expected)
    assert all(torch.equal(*pair) for pair in zip(_tensors(got), _tensors(plain), strict=True))
    # Frozen weights may select another kernel in nn.MultiheadAttention.
    torch.testing.assert_close(_tensors(got), _tensors(expected))
    assert torch.equal(adapter(images()), prompted)


def _tensors(output):
    values = tuple(output.values()) if hasattr(output, "values") and not isinstance(output, torch.Tensor) else output
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def test_disable_adapter_with_errors_and_nested():
    adapter = LongTailPromptAdapter.wrap(small(), 5)
    with pytest.raises(ZeroDivisionError), adapter.disable_adapter():
        raise ZeroDivisionError
    assert adapter(images()).shape == (2, 5)
    with adapter.disable_adapter():
        with adapter.disable_adapter():
            assert adapter(images()).shape == (2, 7)
        assert adapter(images()).shape == (2, 7)
        with pytest.raises(StateError, match=r"outside disable_adapter\(\)"):
            adapter.features(images())
        with pytest.raises(InputError, match="return_output=True"):
            adapter(images(), return_output=True)
    assert isinstance(adapter(images(), return_output=True), AdapterOutput)


def test_disable_adapter_affects_its_thread_only():
    adapter = LongTailPromptAdapter.wrap(small(), 5)
    inside, done, shapes = threading.Event(), threading.Event(), {}

    def plain():
        with adapter.disable_adapter():
            inside.set()
            done.wait(30)
            shapes["plain"] = adapter(images()).shape

    thread = threading.Thread(target=plain)
    thread.start()
    inside.wait(30)
    shapes["prompted"] = adapter(images()).shape
    with adapter.disable_adapter():
        pass
    done.set()
    thread.join(30)
    assert shapes == {"prompted": (2, 5), "plain": (2, 7)}
    assert adapter(images()).shape == (2, 5)


def test_disable_adapter_under_compile():
    adapter = LongTailPromptAdapter.wrap(small(), 5)
    torch._dynamo.reset()
    compiled = torch.compile(adapter, backend="eager")
    assert compiled(images()).shape == (2, 5)
    with adapter.disable_adapter():
        assert compiled(images()).shape == (2, 7)
    assert compiled(images()).shape == (2, 5)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_numbers_of_parameters_equal_those_of_peft(phase, capsys):
    peft = pytest.importorskip("peft")
    adapter = LongTailPromptAdapter.wrap(small(), 5)
    adapter.phase = phase
    counter = peft.PeftModel.get_nb_trainable_parameters
    assert adapter.get_nb_trainable_parameters() == counter(adapter)
    adapter.print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.PeftModel.print_trainable_parameters(adapter)
    assert ours == capsys.readouterr().out
    trainable = sum(p.numel() for p in adapter.trainable_parameters())
    assert f"trainable params: {trainable:,} ||" in ours


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_a_loss_on_logits_gives_every_trainable_parameter_a_gradient(phase):
    """DistributedDataParallel then needs no find_unused_parameters."""
    adapter = LongTailPromptAdapter.wrap(small(), 5).train()
    adapter.phase = phase
    nn.functional.cross_entropy(adapter(images()), torch.tensor([0, 3])).backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable_parameters())
    if phase == "group":
        assert not adapter.pool.keys.grad.any()
        assert adapter.pool.prompts.grad.any()
