"""Every plain ViT of timm, two blocks deep, against token concatenation: forward, gradient, unwrap.

By default every name runs at small width, and a name of every structure at its real width; the other names at real
width are nightly. The stems of the hybrid models have no options and keep their width; so does `vit_base_mci_224`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

from lpt_peft.backbones import find_backbone
from tests.backbones.models import on_meta
from tests.backbones.timm_oracle import prepended_prompts
from tests.backbones.timm_small import HEADS, module_of, small_options
from tests.versions import skip_unless

# Number of names in each module of timm, counted by hand on timm 1.0.31.
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
FLOAT32_NORMS = ("deepseek_vit",)  # their norms compute in float32 for every dtype of the weights

# The narrowest name of every structure; test_every_structure_runs_at_real_width computes them again.
REAL_WIDTH = """
    aimv2_large_patch14_224 beit3_base_patch16_224 beit_base_patch16_224 deepseek_vit_412m
    deepseek_vit_412m_align deepseek_vit_412m_enc deit3_small_patch16_224 deit_tiny_distilled_patch16_224
    eva02_base_patch14_224 eva02_base_patch14_448 eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224
    eva02_tiny_patch14_224 eva02_tiny_patch14_336 eva_giant_patch14_224 eva_giant_patch14_clip_224
    gemma4_vit_167m gemma4_vit_167m_enc naflexvit_base_patch16_radio_v3 naflexvit_base_patch16_siglip
    naflexvit_so150m2_patch16_reg1_gap naflexvit_so150m2_patch16_reg1_map naflexvit_so400m_patch16_radio_v4
    qwen3_vit_88m qwen3_vit_88m_enc qwen3_vit_88m_merge test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos
    vit_base_mci_224 vit_base_patch16_clip_quickgelu_224 vit_base_patch16_radio_v3 vit_base_patch16_reg4_gap_256
    vit_base_patch16_rpn_224 vit_base_patch16_sapiens2 vit_base_patch16_siglip_224 vit_base_patch16_xp_224
    vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256 vit_base_r50_s16_224
    vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_giant_patch14_reg1_tipsv2
    vit_mediumd_patch16_rope_reg1_gap_256 vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512
    vit_pwee_patch16_reg1_gap_256 vit_relpos_medium_patch16_cls_224 vit_relpos_small_patch16_rpn_224
    vit_small_patch14_dinov2 vit_small_patch16_18x2_224 vit_small_patch16_rope_224
    vit_small_patch16_rope_mixed_224 vit_small_patch8_224 vit_small_plus_patch16_dinov3
    vit_so150m_patch16_reg4_map_256 vit_so400m_patch16_radio_v4 vit_srelpos_small_patch16_224
    vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vit_xsmall_patch16_clip_224 vitamin_small_224
""".split()  # noqa: SIM905 - as short as it can be


NAMES = [name for name in timm.list_models() if module_of(name) in CENSUS]


def options_and_plan(name: str, small: bool) -> tuple[dict[str, Any], nn.Module]:
    """Arguments of `create_model` for two blocks, and the model on the meta device."""
    options = {"depth": 2, **(small_options(name) if small else {})}
    try:
        return options, on_meta(lambda: timm.create_model(name, **options))
    except AssertionError:  # a number of key heads per block: keep that of the first and of a middle block
        blocks: Any = on_meta(lambda: timm.create_model(name)).blocks
        attention = [blocks[i].attn for i in (0, len(blocks) // 2)]
        heads = [HEADS if small else attn.num_heads for attn in attention]
        options["num_kv_heads"] = [
            n * attn.num_kv_heads // attn.num_heads for n, attn in zip(heads, attention, strict=True)
        ]
        return options, on_meta(lambda: timm.create_model(name, **options))


def structure(model: nn.Module) -> tuple[Any, ...]:
    """Names and classes of all modules, except inside the convolutional stem of a hybrid model."""
    stems = [name for name, module in model.named_modules() if isinstance(module, HybridEmbed)]
    return tuple(
        (name, type(module))
        for name, module in model.named_modules()
        if not any(name.startswith(f"{stem}.backbone") for stem in stems)
    )


def build(name: str, small: bool) -> nn.Module:
    """Two blocks, float64, three by three tokens (six by six where they are merged)."""
    options, plan = options_and_plan(name, small)
    vit = getattr(plan, "encoder", plan)
    if hasattr(vit, "embeds"):
        ratio = vit.embeds.patch_size[0]
    else:
        ratio = vit.patch_embed.feat_ratio() if hasattr(vit.patch_embed, "feat_ratio") else vit.patch_size
        ratio = math.lcm(*ratio) if isinstance(ratio, tuple) else ratio
    side = ratio * (6 if vit is not plan or name.endswith("_enc") else 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        try:
            model = timm.create_model(name, img_size=side, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():  # what starts at zero (biases, tables, scales) must matter, and so must narrow matrices
            for parameter in model.parameters():
                if small or parameter.ndim == 1 or bool((parameter == 0).all()):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.test_size = side
    return model.double().eval()


def reference_feature(model: nn.Module, images: Tensor) -> Tensor:
    """By timm's own methods; the mean of the tokens for the six `_enc` models, which have none."""
    tokens = model.forward_features(images)
    try:
        feature = model.forward_head(tokens, pre_logits=True)
    except NotImplementedError:
        feature = tokens
    return feature if feature.ndim == 2 else feature.flatten(1, -2).mean(1)


def check_equals_concatenation(name: str, small: bool) -> None:
    model = build(name, small).requires_grad_(False)
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
    expected = []
    for prompts in (shared, per_image):
        with prepended_prompts(vit.blocks, prompts):
            feature = reference_feature(model, images)
        expected.append((feature, torch.autograd.grad((feature**2).mean(), prompts)))

    backbone.attach()
    tolerance = 1e-6 if module_of(name) in FLOAT32_NORMS else 1e-12
    for prompts, (feature, gradients) in zip((shared, per_image), expected, strict=True):
        found = backbone.pool(backbone.run(backbone.embed(images), 0, prompts))
        assert found.shape == (2, backbone.feature_dim)
        torch.testing.assert_close(found, feature, rtol=tolerance, atol=tolerance)
        for grad, reference in zip(torch.autograd.grad((found**2).mean(), prompts), gradients, strict=True):
            limit = tolerance * max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(grad, reference, rtol=0, atol=limit)
    assert torch.equal(model(images), plain), "changed outside the adapter"
    backbone.detach()
    assert torch.equal(model(images), plain), "changed by attach and detach"
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    effect = (expected[0][0] - expected[1][0]).abs().max()
    assert effect > 1e-4 * float(expected[0][0].detach().abs().max()), "the prompt had no effect"


def test_census():
    skip_unless("gemma4_vit_167m" in NAMES, "models of all these modules")
    assert dict(Counter(map(module_of, NAMES))) == CENSUS
    assert len(NAMES) == 322


@functools.cache
def real_structures() -> dict[str, tuple[tuple[Any, ...], int]]:
    """Structure and number of parameters of every name at its real width, two blocks deep."""
    plans = ((name, options_and_plan(name, small=False)[1]) for name in NAMES)
    return {name: (structure(plan), sum(p.numel() for p in plan.parameters())) for name, plan in plans}


def test_every_structure_runs_at_real_width():
    narrowest: dict[tuple[Any, ...], str] = {}
    for name, (key, _) in sorted(real_structures().items(), key=lambda item: (item[1][1], item[0])):
        narrowest.setdefault(key, name)
    skip_unless("gemma4_vit_167m" in NAMES, "models of all these modules")
    assert sorted(narrowest.values()) == sorted(REAL_WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_equals_concatenation(name):
    check_equals_concatenation(name, small=True)


@pytest.mark.parametrize("name", NAMES)
def test_carried_prompts_equal_concatenation(name):
    """A prompt that passes through all blocks, as in VPT-Shallow."""
    model = build(name, small=True).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, model.test_size, model.test_size, dtype=torch.float64, generator=generator)
    vit, backbone = getattr(model, "encoder", model), find_backbone(model)
    prompt = torch.randn(2, 3, vit.embed_dim, dtype=torch.float64, generator=generator).requires_grad_()
    plain = reference_feature(model, images)
    with prepended_prompts(vit.blocks, [prompt] * len(vit.blocks), carried=True):
        feature = reference_feature(model, images)
    [expected] = torch.autograd.grad((feature**2).mean(), prompt)
    backbone.attach()
    stream = backbone.embed(images)
    joined = stream._replace(tokens=torch.cat([stream.tokens, prompt], 1))
    out = backbone.run(joined, 0, [3] * len(vit.blocks))
    found = backbone.pool(out._replace(tokens=out.tokens[:, :-3]))
    tolerance = 1e-6 if module_of(name) in FLOAT32_NORMS else 1e-12
    torch.testing.assert_close(found, feature, rtol=tolerance, atol=tolerance)
    [gradient] = torch.autograd.grad((found**2).mean(), prompt)
    limit = tolerance * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=limit)
    assert (feature - plain).abs().max() > 1e-4 * float(plain.abs().max()), "the prompt had no effect"


@pytest.mark.parametrize("name", NAMES)
def test_small_models_have_the_real_structure(name):
    assert structure(options_and_plan(name, small=True)[1]) == real_structures()[name][0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in REAL_WIDTH else pytest.mark.nightly) for name in NAMES]
)
def test_equals_concatenation_at_real_width(name):
    check_equals_concatenation(name, small=False)
