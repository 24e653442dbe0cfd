"""Inputs and sizes of timm's ViTs under the adapter, against token concatenation, and refusals.

Not here: all models by name (test_timm_all.py), and block and attention classes (tests/test_prompting.py).
"""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.timm.families import GridViT
from lpt_peft.errors import BackboneError, ConfigError, InputError
from lpt_peft.prompting import Prompted
from tests.backbones.models import SMALL, on_meta, timm_model
from tests.backbones.timm_oracle import prepended_prompts
from tests.versions import skip_unless

ROTARY = "naflexvit_base_patch16_gap"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts_for(vit: nn.Module, batch: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [randn(*batch, 3, vit.embed_dim, seed=layer) for layer in range(len(vit.blocks))]


def ours(model: nn.Module, prompts: list[torch.Tensor], *args, **kwargs) -> torch.Tensor:
    backbone = find_backbone(model)
    backbone.attach()
    try:
        return backbone.pool(backbone.run(backbone.embed(*args, **kwargs), 0, prompts))
    finally:
        backbone.detach()


def needs_naflex(rope=None):
    """Skip if timm has no NaFlexVit in its current form, or cannot run it with this `rope`."""
    skip_unless(ROTARY in timm.list_models(), ROTARY)
    model = timm_model(ROTARY, **SMALL, img_size=None, depth=1, **({"rope_type": "mixed"} if rope == "mixed" else {}))
    skip_unless(hasattr(model, "_forward_embeds"), "NaFlexVit that takes patches by name")
    if rope == "mixed":
        try:
            model(padded_batch(8) | {"patches": padded_batch(8)["patches"].float()})
        except TypeError:
            skip_unless(False, "mixed rotary embeddings of padded batches")
            raise


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def padded_batch(patch: int, channels: int = 3) -> dict[str, torch.Tensor]:
    """A 3 x 4 and a 2 x 3 image as patches, padded to 12."""
    patches, coordinates = randn(2, 12, patch * patch * channels), torch.zeros(2, 12, 2, dtype=torch.int64)
    valid = torch.zeros(2, 12, dtype=torch.bool)
    for image, (height, width) in enumerate([(3, 4), (2, 3)]):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        coordinates[image, : len(grid)], valid[image, : len(grid)] = grid, True
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("batch", [(), (2,)], ids=["shared", "per-image"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": True, "global_pool": "token"},
        {"rope_type": "axial"},
        {"rope_type": "mixed"},
        {"rope_type": "dinov3", "reg_tokens": 2},
        {"global_pool": "map"},
    ],
    ids=str,
)
def test_naflex_padded_batches(options, batch):
    needs_naflex(options.get("rope_type"))
    if options.get("rope_type") == "dinov3":
        from timm.models import naflexvit  # noqa: PLC0415 - not in every timm

        skip_unless("'dinov3'" in inspect.getsource(naflexvit), "NaFlexVit with rope_type dinov3")
    model = timm_model(ROTARY, embed_dim=48, num_heads=3, img_size=None, depth=2, **options).double().eval()
    data, prompts = padded_batch(8), prompts_for(model, batch)
    with prepended_prompts(model.blocks, prompts):
        expected = model.forward_head(**model.forward_features(**data), pre_logits=True)
    close(ours(model, prompts, data), expected)
    close(ours(model, prompts, data["patches"], data["patch_coord"], data["patch_valid"]), expected)
    # The values of the padding must not have an effect.
    data["patches"] = torch.where(data["patch_valid"][..., None], data["patches"], data["patches"] + 7.0)
    close(ours(model, prompts, data), expected)
    adapter = LongTailPromptAdapter.wrap(model.eval(), 5)
    adapter.phase = "group"
    assert adapter(data).shape == (2, 5)


def test_naflex_patches_need_coordinates():
    needs_naflex()
    model = timm_model(ROTARY, **SMALL, img_size=None)
    data = padded_batch(8)
    del data["patch_valid"]
    with pytest.raises(InputError, match=r"patch_coord \(B, N, 2\) and patch_valid"):
        ours(model, prompts_for(model), data)


def test_naflex_patch_dropout_in_training():
    for rope in ("axial", "mixed"):
        needs_naflex(rope)
        model = timm_model(ROTARY, **SMALL, img_size=None, rope_type=rope, patch_drop_rate=0.5).double().train()
        prompts, data = prompts_for(model), padded_batch(8)
        for args in ((randn(2, 3, 32, 32),), (data,)):
            with torch.random.fork_rng(devices=[]), prepended_prompts(model.blocks, prompts):
                torch.manual_seed(0)
                if isinstance(args[0], dict):
                    expected = model.forward_head(**model.forward_features(**data), pre_logits=True)
                else:
                    expected = model.forward_head(model.forward_features(*args), pre_logits=True)
            with torch.random.fork_rng(devices=[]):
                find_backbone(model)  # draws no random numbers
                torch.manual_seed(0)
                close(ours(model, prompts, *args), expected)


def test_gemma_padded_batches():
    skip_unless("gemma4_vit_167m" in timm.list_models(), "gemma4_vit_167m")
    model = timm.create_model("gemma4_vit_167m", depth=2, patch_size=8, embed_dim=48, num_heads=3, head_dim=16)
    model = model.double().eval()
    data, prompts = padded_batch(8), prompts_for(model.encoder)
    with prepended_prompts(model.encoder.blocks, prompts):
        tokens = model.forward_features(data["patches"], data["patch_coord"], data["patch_valid"])
        expected = model.forward_head(tokens, patch_valid=data["patch_valid"], pre_logits=True)
    close(ours(model, prompts, data), expected)
    sentinel = torch.where(data["patch_valid"][..., None], data["patch_coord"], -1)
    close(ours(model, prompts, data["patches"], patch_coord=sentinel), expected)


@pytest.mark.parametrize("name", ["gemma4_vit_167m", "qwen3_vit_88m", "deepseek_vit_412m_align"])
def test_encoder_with_a_pooler(name):
    skip_unless(name in timm.list_models(), name)
    pooler = {"gemma4_vit_167m": "soft", "qwen3_vit_88m": "merge", "deepseek_vit_412m_align": "align"}[name]
    more = {"head_dim": 16} if "gemma" in name else {"out_features": 20}
    model = timm.create_model(
        name, depth=2, patch_size=8, embed_dim=48, num_heads=3, img_size=48, encoder_pool=pooler, **more
    )
    model = model.double().eval()
    pictures, prompts = randn(2, 3, 48, 48), prompts_for(model.encoder)
    with prepended_prompts(model.encoder.blocks, prompts):
        expected = model.forward_head(model.forward_features(pictures), pre_logits=True)
    got = ours(model, prompts, pictures)
    assert got.shape == (2, find_backbone(model).feature_dim)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    adapter = LongTailPromptAdapter.wrap(model, 5)
    adapter.phase = "group"  # width of query and keys is not the blocks'
    assert adapter(pictures).shape == (2, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dynamic_image_size(name):
    model = timm_model(name, **SMALL, depth=2, dynamic_img_size=True).double().eval()
    prompts = prompts_for(model)
    for shape in ((2, 3, 32, 32), (2, 3, 40, 24)):
        with prepended_prompts(model.blocks, prompts):
            expected = model.forward_head(model.forward_features(randn(*shape)), pre_logits=True)
        close(ours(model, prompts, randn(*shape)), expected)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"]
)
def test_set_input_size_after_wrap(name):
    model = timm_model(name, **SMALL, depth=2).double().eval()
    skip_unless(hasattr(model, "set_input_size"), f"set_input_size of {name}")
    adapter = LongTailPromptAdapter.wrap(model, 5)
    model.set_input_size((48, 24))
    prompts, pictures = prompts_for(model), randn(2, 3, 48, 24)
    backbone = adapter.backbone
    got = backbone.pool(backbone.run(backbone.embed(pictures), 0, prompts))
    assert backbone.preprocess()["input_size"] == [3, 48, 24]
    assert adapter.unwrap() is model
    with prepended_prompts(model.blocks, prompts):
        close(got, model.forward_head(model.forward_features(pictures), pre_logits=True))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_intermediates_of_a_wrapped_model_do_not_change(name):
    model = timm_model(name, **SMALL).eval().requires_grad_(False)  # torch uses other kernels for a trainable bias
    pictures = randn(2, 3, 32, 32).float()
    final, layers = model.forward_intermediates(pictures)
    LongTailPromptAdapter.wrap(model, 5)
    now, layers_now = model.forward_intermediates(pictures)
    assert torch.equal(now, final)
    assert all(torch.equal(*pair) for pair in zip(layers, layers_now, strict=True))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"])
def test_features_only_towers(name):
    skip_unless(name in timm.list_models(), name)
    if name == ROTARY:
        needs_naflex()
    size = {} if "naflex" in name else {"img_size": 32}
    tower = timm.create_model(name, features_only=True, patch_size=8, depth=3, **SMALL, **size).double().eval()
    pictures = randn(2, 3, 32, 32)
    maps = tower(pictures)
    vit, prompts = tower.model, prompts_for(tower.model)
    with prepended_prompts(vit.blocks, prompts):
        tokens = vit.forward_features(pictures)
    registers = vit.num_prefix_tokens if "naflex" in name else 0  # which has no class token
    expected = tokens[:, registers:].mean(1) if registers else tokens[:, 0]
    if vit.global_pool:  # timm before 1.0.31 leaves NaFlexVit its pool and the norm behind
        expected = vit.forward_head(tokens, pre_logits=True)
    adapter = LongTailPromptAdapter.wrap(tower, 5)
    assert adapter.vit is tower
    backbone = adapter.backbone
    close(backbone.pool(backbone.run(backbone.embed(pictures), 0, prompts)), expected)
    assert all(torch.equal(*pair) for pair in zip(tower(pictures), maps, strict=True))
    assert adapter.unwrap() is tower
    assert not any(isinstance(part, Prompted) for part in tower.modules())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xcit_nano_12_p8_224", r"Xcit cannot take prompts: .*channels.*deit3_small"),
        ("volo_d1_224", r"VOLO cannot take prompts: .*grid"),
        ("convit_tiny", r"ConVit cannot take prompts: .*grid.*vit_relpos_small"),
        ("swin_tiny_patch4_window7_224", r"SwinTransformer cannot take prompts: .*windows.*vit_base_patch16_224"),
        ("hiera_tiny_224", r"Hiera cannot take prompts: .*windows"),
        ("maxvit_nano_rw_256", r"MaxxVit cannot take prompts: .*windows"),
        ("resnet18", r"ResNet cannot take prompts: it has no attention over tokens.*vit_small_r26_s32_224"),
        ("convnext_atto", r"ConvNeXt cannot take prompts: it has no attention"),
        ("cait_xxs24_224", r"Cait cannot take prompts: .*not supported yet"),
        ("samvit_base_patch16", r"VisionTransformerSAM cannot take prompts: .*not supported yet"),
    ],
)
def test_refusals_name_class_reason_and_alternative(name, words):
    model = on_meta(lambda: timm.create_model(name))
    before = [type(part) for part in model.modules()]
    with pytest.raises(BackboneError, match=words):
        LongTailPromptAdapter.wrap(model)
    assert [type(part) for part in model.modules()] == before


def test_wrapped_and_compiled_models_are_refused_with_an_alternative():
    vit = timm_model("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(BackboneError, match=r"OptimizedModule cannot take prompts.*_orig_mod"):
        LongTailPromptAdapter.wrap(torch.compile(vit))
    with pytest.raises(BackboneError, match=r"DataParallel cannot take prompts.*DistributedDataParallel"):
        LongTailPromptAdapter.wrap(nn.DataParallel(vit))
    with pytest.raises(BackboneError, match=r"cannot take prompts: it already has prompts"):
        LongTailPromptAdapter.wrap(LongTailPromptAdapter.wrap(vit))
    with pytest.warns(), pytest.raises(BackboneError, match=r"cannot take prompts: its forward is fixed"):
        LongTailPromptAdapter.wrap(torch.jit.trace(timm_model("vit_tiny_patch16_224"), torch.zeros(1, 3, 32, 32)))


def test_an_overridden_forward_is_refused():
    class OwnEva(type(timm_model("eva02_tiny_patch14_224"))):
        def forward_head(self, x, pre_logits=False):
            return super().forward_head(x * 2, pre_logits)

    vit = OwnEva(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(BackboneError, match=r"OwnEva overrides Eva\.forward_head"):
        LongTailPromptAdapter.wrap(vit)


def test_encoder_without_classifier_needs_num_classes():
    skip_unless("qwen3_vit_88m_enc" in timm.list_models(), "qwen3_vit_88m_enc")
    encoder = timm.create_model("qwen3_vit_88m_enc", depth=2, patch_size=8, img_size=48, embed_dim=48, num_heads=3)
    with pytest.raises(ConfigError, match="num_classes"):
        LongTailPromptAdapter.wrap(encoder)
    assert isinstance(LongTailPromptAdapter.wrap(encoder, 5).backbone, GridViT)


def test_clipped_linears_on_the_meta_device():
    skip_unless("gemma4_vit_167m" in timm.list_models(), "gemma4_vit_167m")
    with torch.device("meta"):
        model = timm.create_model("gemma4_vit_167m", depth=1, embed_dim=48, num_heads=3, head_dim=16)
    assert any(getattr(part, "use_clipped", False) for part in model.modules())
    LongTailPromptAdapter.wrap(model, 5, query="final")
    assert any(getattr(part, "use_clipped", False) for part in model.modules())


def test_naflexvit_of_old_versions_is_refused(monkeypatch):
    vit = timm_model(ROTARY, **SMALL, img_size=None)
    monkeypatch.delattr(type(vit), "_forward_embeds", raising=False)
    with pytest.raises(BackboneError, match=r"NaFlexVit of timm .* has no _forward_embeds.*Upgrade timm"):
        LongTailPromptAdapter.wrap(vit, 5)


class Normalising(VisionTransformer):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


def test_a_replaced_forward_is_refused():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with pytest.raises(BackboneError, match=r"Normalising overrides VisionTransformer\.forward"):
        LongTailPromptAdapter.wrap(Normalising(**options), 3)
    vit = VisionTransformer(**options)
    vit.forward_features = lambda x: x
    with pytest.raises(BackboneError, match="VisionTransformer has forward_features replaced on the object"):
        LongTailPromptAdapter.wrap(vit, 3)


def test_batch_norm_modes_are_restored():
    vit = timm.create_model("vit_small_resnet26d_224", img_size=64, depth=2).train()
    norms = [module for module in vit.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[1].eval()
    before = [norm.training for norm in norms]
    adapter = LongTailPromptAdapter.wrap(vit, 3)
    assert not any(norm.training for norm in norms)
    adapter.unwrap()
    assert [norm.training for norm in norms] == before
    adapter = LongTailPromptAdapter.wrap(vit, 3)
    adapter.eval().train()
    assert not any(norm.training for norm in norms)
    adapter.unwrap()
    assert all(norm.training for norm in norms), "the present mode, once it was set"


def test_preprocess_has_the_channels_of_the_model():
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32, depth=1)
    assert find_backbone(vit).preprocess()["input_size"] == [1, 32, 32]
    assert find_backbone(timm.create_model("vit_tiny_patch16_224", depth=1)).preprocess()["input_size"] == [3, 224, 224]
