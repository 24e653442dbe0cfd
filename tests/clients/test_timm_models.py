"""The checks of timm's tests/test_models.py on wrapped models.

Not asked: `features_only`, `forward_features`, `forward_intermediates` and `reset_classifier` (they are the plain
model's, without prompts: call them on `adapter.vit` before wrapping), TorchScript and symbolic tracing by torch.fx.
"""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint

from lpt_peft import LongTailPromptAdapter

NAMES = ["test_vit", "test_vit3", "test_vit4", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224"]
models = pytest.mark.parametrize("name", NAMES)
phases = pytest.mark.parametrize("phase", ["shared", "group"])


def build(name, phase="shared", seed=0):
    sizes = {} if name.startswith("test_") else {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(name, num_classes=42, **sizes)
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(vit, prompt_length=2, pool_size=4)
    adapter.phase = phase
    return adapter


def images(adapter, count=2):
    size = adapter.vit.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


@models
@phases
def test_forward_and_checkpointing(name, phase):
    adapter = build(name, phase).eval()
    batch = images(adapter)
    outputs = adapter(batch)
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    torch.testing.assert_close(torch.cat([adapter(image[None]) for image in batch]), outputs, rtol=1e-4, atol=1e-4)
    adapter.set_grad_checkpointing()
    assert torch.allclose(adapter(batch), outputs, rtol=1e-4, atol=1e-5)


@models
@phases
def test_backward(name, phase):
    """timm requires a gradient of every parameter; here only parameters of the phase have gradients."""
    adapter = build(name, phase).train()
    adapter(images(adapter)).mean().backward()
    with_gradient = {key for key, parameter in adapter.named_parameters() if parameter.grad is not None}
    expected = {"shared": {"shared.prompts", "head.weight"}, "group": {"pool.prompts", "pool.keys", "head.weight"}}
    assert with_gradient == expected[phase]


@models
def test_default_cfg(name):
    """Numbers and names in the configuration fit the model; keys of the wrapped model start with `vit.`."""
    adapter = build(name).eval()
    config, state = adapter.default_cfg, adapter.state_dict()
    assert config == adapter.pretrained_cfg == adapter.vit.pretrained_cfg
    assert adapter.num_classes == 42
    assert adapter.num_features == adapter.head_hidden_size == adapter.features(images(adapter)).shape[1]
    assert adapter.head_hidden_size == adapter.vit.head_hidden_size
    assert adapter.in_chans == adapter.vit.in_chans == 3
    assert f"vit.{config['classifier']}.weight" in state
    assert f"vit.{config['first_conv']}.weight" in state
    assert adapter.get_classifier() is adapter.head
    for missing in ("forward_features", "forward_intermediates", "reset_classifier", "prune_intermediate_layers"):
        assert not hasattr(adapter, missing)


@models
@phases
def test_state_dict_round_trip(name, phase, tmp_path):
    """By load_state_dict and by timm's load_checkpoint, from .pth and .safetensors; wrong keys are named."""
    saved = build(name, phase, seed=5).eval()
    batch = images(saved)
    state = saved.state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "ddp.pth")
    save_file({key: value.contiguous().clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    for file in ("ddp.pth", "model.safetensors"):
        adapter = build(name).eval()
        load_checkpoint(adapter, str(tmp_path / file))
        assert adapter.phase == phase
        assert torch.equal(adapter(batch), saved(batch))
    del state["pool.keys"]
    with pytest.raises(RuntimeError, match=r"Missing key.*pool\.keys"):
        build(name).load_state_dict(state)


@models
def test_resetting_the_classifier_of_the_model_does_not_affect_the_adapter(name):
    adapter = build(name).eval()
    batch = images(adapter)
    before = adapter(batch)
    adapter.vit.reset_classifier(7)
    assert torch.equal(adapter(batch), before)
    assert adapter.num_classes == 42
    with adapter.disable_adapter():
        assert adapter(batch).shape == (2, 7)
    assert adapter.unwrap()(batch).shape == (2, 7)
