"""Every plain ViT of timm, two blocks deep, against token concatenation: forward, gradient, unwrap."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lpt_peft.backbones import find_backbone
from tests.backbones.models import on_meta
from tests.backbones.timm_oracle import prepended_prompts
from tests.versions import skip_unless

# Issue and design: how many names each module of timm has, counted by hand on timm 1.0.31.
CENSUS = {
    "vision_transformer": 163,
    "deit": 16,
    "vision_transformer_hybrid": 14,
    "vitamin": 13,
    "naflexvit": 14,
    "eva": 65,
    "beit": 7,
    "vision_transformer_relpos": 14,
    "qwen3_vit": 9,
    "gemma4_vit": 4,
    "deepseek_vit": 3,
}
FLOAT32_NORMS = ("deepseek_vit",)  # their norms compute in float32 whatever the weights are


def module_of(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


NAMES = [name for name in timm.list_models() if module_of(name) in CENSUS]


def build(name: str) -> nn.Module:
    """Two blocks, float64, the real width, three by three tokens (six by six where they are merged)."""
    options: dict[str, Any] = {}
    try:
        plan = on_meta(lambda: timm.create_model(name, depth=2))
    except AssertionError:  # one number of key heads a block: keep that of the first and of a middle one
        blocks: Any = on_meta(lambda: timm.create_model(name)).blocks
        options["num_kv_heads"] = [blocks[i].attn.num_kv_heads for i in (0, len(blocks) // 2)]
        plan = on_meta(lambda: timm.create_model(name, depth=2, **options))
    vit = getattr(plan, "encoder", plan)
    if hasattr(vit, "embeds"):
        ratio = vit.embeds.patch_size[0]
    else:
        ratio = vit.patch_embed.feat_ratio() if hasattr(vit.patch_embed, "feat_ratio") else vit.patch_size
        ratio = math.lcm(*ratio) if isinstance(ratio, tuple) else ratio
    side = ratio * (6 if vit is not plan or name.endswith("_enc") else 3)
    options["img_size"] = side
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        try:
            model = timm.create_model(name, depth=2, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():  # zero-initialised parts (biases, tables, scales) must matter
            for parameter in model.parameters():
                if parameter.ndim == 1 or bool((parameter == 0).all()):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.test_size = side
    return model.double().eval()


def reference_feature(model: nn.Module, images: Tensor) -> Tensor:
    """By timm's own methods, which the six `_enc` models lack: there, the token mean."""
    tokens = model.forward_features(images)
    try:
        feature = model.forward_head(tokens, pre_logits=True)
    except NotImplementedError:
        feature = tokens
    return feature if feature.ndim == 2 else feature.flatten(1, -2).mean(1)


def test_census():
    skip_unless("gemma4_vit_167m" in NAMES, "models of all these modules")
    assert dict(Counter(map(module_of, NAMES))) == CENSUS
    assert len(NAMES) == 322


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_concatenation(name):
    model = build(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, model.test_size, model.test_size, dtype=torch.float64, generator=generator)
    vit, backbone = getattr(model, "encoder", model), find_backbone(model)
    shared, per_image = (
        [
            torch.randn(*batch, 3, vit.embed_dim, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in range(2)
        ]
        for batch in ((), (2,))
    )
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    try:
        plain = model(images)
    except RuntimeError:  # mixed rotary embeddings, before anything is wrapped
        skip_unless(False, f"float64 for {name}")
        raise
    wanted = []
    for prompts in (shared, per_image):
        with prepended_prompts(vit.blocks, prompts):
            feature = reference_feature(model, images)
        wanted.append((feature, torch.autograd.grad((feature**2).mean(), prompts)))

    backbone.attach()
    tolerance = 1e-6 if module_of(name) in FLOAT32_NORMS else 1e-12
    for prompts, (feature, gradients) in zip((shared, per_image), wanted, strict=True):
        got = backbone.pool(backbone.run(backbone.embed(images), 0, prompts))
        assert got.shape == (2, backbone.feature_dim)
        torch.testing.assert_close(got, feature, rtol=tolerance, atol=tolerance)
        for one, two in zip(torch.autograd.grad((got**2).mean(), prompts), gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=tolerance * max(1.0, float(two.abs().max())))
    assert torch.equal(model(images), plain), "changed outside the adapter"
    backbone.detach()
    assert torch.equal(model(images), plain), "changed by attach and detach"
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    effect = (wanted[0][0] - wanted[1][0]).abs().max()
    assert effect > 1e-4 * float(wanted[0][0].detach().abs().max()), "the prompt had no effect"
