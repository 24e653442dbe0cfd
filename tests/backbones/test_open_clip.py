"""open_clip's visual towers against token concatenation, and what is refused."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import Counter
from typing import Any
from unittest import mock

import open_clip
import pytest
import timm
import torch
from open_clip import factory
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    CustomTransformer,
    LayerNormFp32,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.errors import BackboneError, ConfigError
from lpt_peft.prompting import Prompted
from tests.backbones.mha_oracle import assert_adapter_is_lpt, make_prompts, noise, seeded, with_prompts
from tests.backbones.timm_oracle import prepended_prompts
from tests.backbones.timm_small import WIDTH, small_options

IMAGES = noise(3, 3, 32, 32)
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
POOLER: dict[str, Any] = {"attn_pooler_queries": 5, "attn_pooler_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "avg": {"pool_type": "avg"},
    "none": {"pool_type": "none"},
    "norm after pool": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "norm after CLS": {"final_ln_after_pool": True},
    "queries": {"attentional_pool": True, **POOLER, "output_tokens": True},
    "queries, avg": {"attentional_pool": True, **POOLER, "pool_type": "avg"},
    "queries, none": {"attentional_pool": True, **POOLER, "pool_type": "none"},
    "queries, parallel": {"attentional_pool": "parallel", **POOLER, "output_dim": 24},
    "queries, cascade": {"attentional_pool": "cascade", **POOLER, "output_dim": 24},
    "tokens too": {"output_tokens": True},
    "layer scale": {"ls_init_value": 0.5},
    "quick gelu": {"act_layer": QuickGELU},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "not square": {"image_size": (32, 32), "patch_size": (8, 16)},
    "custom": {"block_type": "custom", "ls_init_value": 0.5},
    "custom, qk-norm": {"qk_norm": True},
    "custom, head scales": {"scale_heads": True},
    "custom, inner norm": {"scale_attn_inner": True},
    "custom, norm behind": {"scale_attn": True},
    "custom, norm in the MLP": {"scale_fc": True},
    "custom, all": CUSTOM,
}
VISION = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"width": 16, "heads": 2, "layers": 2, "context_length": 8, "vocab_size": 50}
COMPLETE = {
    "CLIP": lambda **vision: CLIP(20, {**VISION, **vision}, TEXT),
    "CustomTextCLIP": lambda **vision: CustomTextCLIP(20, {**VISION, **vision}, TEXT),
    "CoCa": lambda **vision: CoCa(
        20,
        {**TEXT, "mlp_ratio": 2},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        {**VISION, "attentional_pool": True, **POOLER, "output_tokens": True, **vision},
    ),
}


def tiny(*, dtype=torch.float64, cls=VisionTransformer, **options):
    settings = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    return seeded(lambda: cls(**{**settings, "output_dim": 20, **options}), dtype)


def complete(kind="CLIP", *, dtype=torch.float64, **vision):
    return seeded(lambda: COMPLETE[kind](**vision), dtype)


def timm_tower(name, *, depth=2, size=None, dtype=torch.float64, **options):
    """TimmModel passes neither depth nor size on to timm."""
    few = functools.partial(timm.create_model, depth=depth, **({"img_size": size} if size else {}))
    with mock.patch.object(timm, "create_model", few):
        return seeded(lambda: TimmModel(name, 20, image_size=size or 224, **options), dtype)


def feature_of(model):
    """The tower's forward; the first token if the tower has no pooling."""
    tower = getattr(model, "visual", model)

    def feature(images):
        out = tower(images)
        out = out[0] if isinstance(out, tuple) else out
        return out if out.ndim == 2 else out[:, 0]

    return feature


def blocks_of(model):
    tower = getattr(model, "visual", model)
    return tower.trunk.blocks if isinstance(tower, TimmModel) else tower.transformer.resblocks


def features(model, images, prompts):
    backbone = find_backbone(model)
    backbone.attach()
    out = backbone.pool(backbone.run(backbone.embed(images), 0, prompts))
    assert out.shape == (len(images), backbone.feature_dim)
    return out


def assert_equals_concatenation(model, dim, images=IMAGES, batch=None):
    plain = feature_of(model)(images)
    prompts = make_prompts(dim, batch=batch)
    expected, expected_gradients = with_prompts(blocks_of(model), feature_of(model), images, prompts)
    found = features(model, images, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(torch.autograd.grad((found**2).sum(), prompts), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max(), "the prompt had no effect"


@pytest.mark.parametrize("batch", [None, 3], ids=["shared", "per-image"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_native_tower_equals_concatenation(options, training, batch):
    assert_equals_concatenation(tiny(**options).train(training), 24, batch=batch)


@pytest.mark.parametrize("name", ["plain", "queries", "norm after pool", "custom, all"])
def test_adapter_in_both_phases(name):
    tower = tiny(**VARIANTS[name])
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(tower), 7, pool_size=5, shared_layers=1, query="final")
    assert_adapter_is_lpt(adapter, blocks_of(tower), feature_of(tower), IMAGES)


@pytest.mark.parametrize("kind", COMPLETE)
def test_complete_model(kind):
    """The adapter accepts the images of encode_image, and leaves the text tower unchanged."""
    clip = complete(kind)
    text = [module for name, module in clip.named_modules() if not name.startswith("visual") and name]
    classes = [type(module) for module in text]
    assert ResidualAttentionBlock in classes, "the text tower shares the block class"
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(clip), 7, pool_size=5, query="final")
    copied = [module for name, module in adapter.vit.named_modules() if not name.startswith("visual") and name]
    assert [type(module) for module in copied] == classes
    assert adapter(IMAGES).shape == (3, 7)
    assert_adapter_is_lpt(adapter, blocks_of(clip), lambda x: clip.encode_image(x, normalize=False), IMAGES)
    words = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    frozen = copy.deepcopy(clip).requires_grad_(False)
    assert torch.equal(adapter.vit.encode_text(words), frozen.encode_text(words))


VISION_OF = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
TIMM = [name for name, vision in VISION_OF.items() if "timm_model_name" in vision]
NATIVE = [name for name, vision in VISION_OF.items() if name not in TIMM and isinstance(vision["layers"], int)]
# A name for each trunk: many configurations differ only in size or text tower.
TRUNK_NAMES = sorted({VISION_OF[name]["timm_model_name"]: name for name in TIMM}.values())


def test_census():
    assert (len(NATIVE), len(TIMM), len(VISION_OF)) == (56, 78, 144)


@pytest.mark.parametrize("name", NATIVE)
def test_every_native_configuration(name):
    """All options of the configuration, with two blocks of two heads and two by two patches."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    vision.update(layers=2, width=2 * vision.get("head_width", 64), image_size=2 * vision["patch_size"])
    tower = seeded(lambda: _build_vision_tower(32, vision, config.get("quick_gelu", False)))
    side = vision["image_size"]
    assert_equals_concatenation(tower, vision["width"], noise(2, 3, side, side), batch=2)


@pytest.mark.parametrize("name", TRUNK_NAMES)
def test_every_timm_trunk_wraps_or_is_refused(name):
    config = open_clip.get_model_config(name)
    trunk = config["vision_cfg"]["timm_model_name"]
    refused = trunk.startswith(("convnext", "fastvit", "swin"))
    small = functools.partial(timm.create_model, **({} if refused else {"depth": 2, **small_options(trunk)}))
    with torch.device("meta"), mock.patch.object(timm, "create_model", small):
        tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
    if refused:
        with pytest.raises(BackboneError, match=r"holds a timm model.*cannot take prompts.*ViT-B-32"):
            find_backbone(tower)
        return
    adapter = LongTailPromptAdapter.wrap(tower, 5)
    projects = config["vision_cfg"].get("timm_proj") != "none"
    assert adapter.prompt_config.feature_dim == (config["embed_dim"] if projects else WIDTH)
    assert all(isinstance(block, Prompted) for block in tower.trunk.blocks)


TRUNKS: dict[str, dict[str, Any]] = {
    "CLS, head of the trunk": {"name": "vit_tiny_patch16_224", "pool": "token", "proj": None},
    "mean, linear": {"name": "vit_tiny_patch16_224", "pool": "avg", "proj": "linear", "proj_bias": True},
    "mean, MLP": {"name": "vit_tiny_patch16_224", "pool": "avg", "proj": "mlp"},
    "the trunk's own pool, linear": {"name": "vit_tiny_patch16_224", "pool": "", "proj": "linear"},
    "rotary, CLS": {"name": "eva02_tiny_patch14_224", "pool": "avg", "proj": None},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "pool": "token", "proj": "linear"},
    "attention, none": {"name": "vit_small_patch16_224", "pool": "map", "proj": "none"},
    "relative positions": {"name": "vit_relpos_small_patch16_224", "pool": "", "proj": "linear"},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", TRUNKS.values(), ids=TRUNKS)
def test_timm_towers(options, training):
    size = 28 if "patch14" in options["name"] else 32
    tower = timm_tower(**options, size=size).train(training)
    for module in tower.modules():
        if isinstance(module, nn.Dropout):  # also in the tables of relative positions
            module.p = 0.0
    images = noise(3, 3, size, size)
    backbone = find_backbone(tower)
    prompts = make_prompts(backbone.dim, batch=3)
    with prepended_prompts(tower.trunk.blocks, prompts):
        expected = tower(images)
    expected_gradients = torch.autograd.grad((expected**2).sum(), prompts)
    found = features(tower, images, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(torch.autograd.grad((found**2).sum(), prompts), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11 * float(reference.abs().max()))
    assert not torch.allclose(found, tower(images), atol=1e-3)
    info = backbone.info()
    assert (info.library, info.architecture, info.depth) == ("open_clip", options["name"], 2)


def test_timm_tower_in_both_phases_with_checkpointing_and_no_dropout():
    tower = timm_tower("vit_tiny_patch16_224", size=32, pool="avg", proj="mlp", drop=0.5)
    copied = copy.deepcopy(tower).train()
    copied.set_grad_checkpointing()
    adapter = LongTailPromptAdapter.wrap(copied, 7, pool_size=5, shared_layers=1, query="final")
    assert_adapter_is_lpt(adapter, blocks_of(tower), feature_of(tower), IMAGES)


def test_custom_transformer():
    tower = tiny()
    tower.transformer = seeded(lambda: CustomTransformer(24, 2, 2, 2.0))
    assert_equals_concatenation(tower, 24, batch=3)


def test_transformer_that_is_not_batch_first():
    tower = tiny()
    tower.transformer = seeded(lambda: Transformer(24, 2, 2, 2.0, batch_first=False))
    plain = tower(IMAGES)
    prompts, handles = make_prompts(24, batch=3), []
    for block, prompt in zip(tower.transformer.resblocks, prompts, strict=True):  # the oracle, tokens first
        rows = prompt.transpose(0, 1)
        handles.append(block.register_forward_pre_hook(lambda _, args, rows=rows: (torch.cat([args[0], rows]),)))
        handles.append(block.register_forward_hook(lambda _, args, out: out[:-4]))
    expected = tower(IMAGES)
    expected_gradients = torch.autograd.grad((expected**2).sum(), prompts)
    for handle in handles:
        handle.remove()
    found = features(tower, IMAGES, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(torch.autograd.grad((found**2).sum(), prompts), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tower(IMAGES), plain, rtol=0, atol=0)
    assert all(not block.attn.batch_first for block in tower.transformer.resblocks)


def test_patch_dropout_keeps_the_same_patches_in_both_passes():
    tower = tiny(patch_dropout=0.5).train()
    copied = copy.deepcopy(tower)
    prompts = make_prompts(24, batch=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected, _ = with_prompts(blocks_of(tower), tower, IMAGES, prompts)
        torch.manual_seed(3)
        torch.testing.assert_close(features(copied, IMAGES, prompts), expected, rtol=1e-12, atol=1e-12)
        adapter = LongTailPromptAdapter.wrap(copy.deepcopy(tower), 7, pool_size=5, query="final")
        adapter.phase = "group"
        torch.manual_seed(4)
        query = adapter(IMAGES, return_output=True).query
        torch.manual_seed(4)
        expected, _ = with_prompts(
            blocks_of(tower), tower, IMAGES, list(adapter.shared.prompts.clone().requires_grad_())
        )
    torch.testing.assert_close(query, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, CUSTOM], ids=["native", "custom"])
def test_checkpointing_with_two_passes_before_one_backward(options):
    tower = tiny(**options)
    first, second = make_prompts(24, batch=None), make_prompts(24, batch=3, seed=9)
    expected = [with_prompts(blocks_of(tower), tower, IMAGES, prompts)[1] for prompts in (first, second)]
    tower.set_grad_checkpointing()
    calls = Counter()
    backbone = find_backbone(tower)
    backbone.attach()
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda *_: calls.update(["block"]))
    total = 0
    for prompts in (first, second):
        total = total + (backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts)) ** 2).sum()
    assert calls["block"] == 4
    gradients = torch.autograd.grad(total, first + second)
    assert calls["block"] == 8, "not recomputed"
    for gradient, reference in zip(gradients, [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"block_type": "custom"}], ids=["native", "custom"])
def test_neutral_outside_the_adapter_and_after_unwrap(options, training):
    clip = complete(**options).train(training)
    clip.lock_image_tower(unlocked_groups=1)
    keys, classes = list(clip.state_dict()), [type(module) for module in clip.modules()]
    tensors, trainable = copy.deepcopy(clip.state_dict()), [p.requires_grad for p in clip.parameters()]
    plain = clip.encode_image(IMAGES)
    # Freezing alone changes torch's choice of kernels inside nn.MultiheadAttention, and with it the last bits.
    frozen = copy.deepcopy(clip).requires_grad_(False).encode_image(IMAGES)
    adapter = LongTailPromptAdapter.wrap(clip, 7)
    adapter(IMAGES)
    assert torch.equal(clip.encode_image(IMAGES), frozen)
    assert list(clip.state_dict()) == keys
    assert adapter.unwrap() is clip
    assert torch.equal(clip.encode_image(IMAGES), plain)
    assert [type(module) for module in clip.modules()] == classes
    assert [parameter.requires_grad for parameter in clip.parameters()] == trainable
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in clip.state_dict().items())


@pytest.mark.parametrize("options", [{}, CUSTOM], ids=["native", "custom"])
@pytest.mark.parametrize("phase", ["shared", "group"])
def test_deepcopy_pickle_and_compile(phase, options):
    adapter = LongTailPromptAdapter.wrap(complete(**options), 7, pool_size=5, query="final")
    adapter.phase = phase
    expected = adapter(IMAGES)
    assert torch.equal(copy.deepcopy(adapter)(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(IMAGES), expected)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, CUSTOM], ids=["native", "custom"])
def test_bfloat16_autocast(options):
    tower = tiny(dtype=torch.float32, **options)
    prompts = [prompt.detach().float().requires_grad_() for prompt in make_prompts(24, batch=None)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = with_prompts(blocks_of(tower), tower, IMAGES.float(), prompts)
        found = features(tower, IMAGES.float(), prompts)
        gradients = torch.autograd.grad((found**2).sum(), prompts)
    assert (found - expected).norm() < 0.03 * expected.norm()
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient - reference).norm() < 0.1 * reference.norm()


@pytest.fixture
def tiny_config(monkeypatch):
    config = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)


@pytest.mark.usefixtures("tiny_config")
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp32"])
def test_models_of_the_factory_in_every_precision(precision):
    """In bf16 open_clip keeps its norms in float32 (LayerNormFp32), which the self-check must allow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.create_model("tiny", precision=precision)
    assert any(isinstance(module, LayerNormFp32) for module in clip.modules()) == (precision == "bf16")
    images = IMAGES.to(open_clip.get_input_dtype(precision) or torch.float32)
    prompts = [prompt.detach().to(images.dtype).requires_grad_() for prompt in make_prompts(24, batch=3)]
    expected, _ = with_prompts(blocks_of(clip), clip.encode_image, images, prompts)
    found = features(clip, images, prompts)
    assert (found - expected).norm() < (1e-5 if precision == "fp32" else 0.03) * expected.norm()


@pytest.mark.usefixtures("tiny_config")
@pytest.mark.parametrize(
    ("resize_mode", "crop_mode"), [("shortest", "center"), ("longest", "border"), ("squash", "squash")]
)
def test_preprocess_equals_the_record_of_the_factory(resize_mode, crop_mode):
    clip, _, transform = open_clip.create_model_and_transforms(
        "tiny", image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), image_resize_mode=resize_mode
    )
    normalize = transform.transforms[-1]
    for model in (clip, clip.visual):
        assert find_backbone(model).preprocess() == {
            "input_size": [3, 32, 32],
            "mean": list(normalize.mean),
            "std": list(normalize.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": crop_mode,
        }


def test_preprocess_of_a_bare_tower_is_open_clips_default():
    preprocess = find_backbone(tiny(image_size=(32, 16))).preprocess()
    assert preprocess["input_size"] == [3, 32, 16]
    assert preprocess["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    tower = tiny()
    tower.image_mean, tower.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    assert find_backbone(tower).preprocess()["mean"] == [0.5, 0.5, 0.5]
    assert find_backbone(tower).preprocess()["std"] == [0.25, 0.25, 0.25]


def test_info_and_fingerprint_are_of_the_visual_tower():
    clip = complete()
    backbone, info = find_backbone(clip), find_backbone(clip).info()
    assert (info.library, info.library_version) == ("open_clip", open_clip.__version__)
    assert (info.architecture, info.embed_dim, info.depth, info.num_heads) == ("VisionTransformer", 24, 2, 2)
    assert dict(info.model_args) == {"image_size": [32, 32], "patch_size": [8, 8], "output_dim": 20}
    assert info.num_parameters == sum(p.numel() for p in clip.visual.parameters())
    assert info == find_backbone(clip.visual).info()
    before = fingerprint(backbone.frozen_tensors())
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            parameter.add_(0.0 if name.startswith("visual") else 1.0)
    assert fingerprint(find_backbone(clip).frozen_tensors()) == before
    with torch.no_grad():
        clip.visual.proj[0, 0] += 1
    assert fingerprint(find_backbone(clip).frozen_tensors()) != before


@pytest.mark.parametrize("pruned", [False, True])
def test_feature_width(pruned):
    tower = tiny()
    if pruned:
        tower.prune_intermediate_layers(1)
    backbone = find_backbone(tower)
    assert (backbone.feature_dim, backbone.num_classes) == (24 if pruned else 20, 0)
    assert (
        features(tower, IMAGES, make_prompts(24, batch=None)[: len(backbone.blocks)]).shape[1] == backbone.feature_dim
    )
    assert find_backbone(tiny(attentional_pool=True, **POOLER)).feature_dim == 20


def test_number_of_classes_is_required():
    with pytest.raises(ConfigError, match="num_classes="):
        LongTailPromptAdapter.wrap(complete())


def test_prompt_file_of_the_complete_model_loads_into_the_tower(tmp_path):
    clip = complete("CoCa", dtype=torch.float32)
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(clip), 7, pool_size=5)
    adapter.phase = "group"
    adapter.save_pretrained(tmp_path)
    again = LongTailPromptAdapter.from_pretrained(tmp_path, clip.visual)
    assert torch.equal(again(IMAGES.float()), adapter(IMAGES.float()))


@pytest.mark.parametrize(
    ("options", "targets"),
    [({}, r"attn"), ({}, r"mlp\.c_(fc|proj)"), (CUSTOM, r"(attn\.out_proj|mlp\.c_fc)")],
    ids=["attention", "mlp", "custom"],
)
def test_lora_of_the_visual_tower(options, targets, recwarn):
    """peft wraps nn.MultiheadAttention; the oracle is the model with LoRA, by token concatenation."""
    clip = complete(**options)
    targets = rf"visual\.transformer\.resblocks\.\d\.{targets}"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    clip = inject_adapter_in_model(config, clip).double()
    assert not torch.allclose(clip.encode_image(IMAGES), complete(**options).encode_image(IMAGES), atol=1e-3)
    recwarn.clear()
    assert_equals_concatenation(clip, 24, batch=3)
    drifting = targets.endswith("attn")
    assert any("Merge the LoRA before wrap" in str(warning.message) for warning in recwarn) == drifting


def test_dropout_of_the_custom_block():
    """Dropout of outputs, replaced by a function that the oracle computes too; dropout of attention in training."""
    tower = tiny(**CUSTOM)
    for block in blocks_of(tower):
        block.attn.out_drop = nn.Softsign()
    assert_equals_concatenation(tower, 24, batch=3)
    for block in blocks_of(tower):
        block.attn.attn_drop.p = 0.5
    prompts, backbone = make_prompts(24, batch=None), find_backbone(tower)
    for training in (False, True):
        tower.train(training)
        with torch.random.fork_rng(devices=[]):
            once, twice = (backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts)) for _ in range(2))
        assert torch.allclose(once, twice, atol=1e-3) != training


def test_cosine_attention(monkeypatch):
    """open_clip 3.3 fails here (bmm on four dimensions): refused, and exact as soon as bmm is corrected."""
    tower = tiny(scaled_cosine_attn=True, scale_heads=True)
    with pytest.raises(RuntimeError, match="3D tensor"):
        tower(IMAGES)
    with pytest.raises(BackboneError, match=r"CustomResidualAttentionBlock of open_clip\.transformer.*3D tensor"):
        LongTailPromptAdapter.wrap(tower, 7)
    assert not any(isinstance(module, Prompted) for module in tower.modules())
    monkeypatch.setattr(torch, "bmm", torch.matmul)
    with torch.no_grad():
        for block in blocks_of(tower):
            block.attn.logit_scale[0] = 6.0  # above the limit at which it is clamped
    assert_equals_concatenation(tower, 24, batch=3)


def test_refusals_give_reason_and_cure():
    with pytest.raises(BackboneError, match=r"ModifiedResNet cannot take prompts: .*convolutional.*ViT-B-32"):
        LongTailPromptAdapter.wrap(ModifiedResNet([1, 1, 1, 1], 16, 2, 64, 8), 7)
    with pytest.raises(BackboneError, match=r"ModifiedResNet cannot take prompts"):
        LongTailPromptAdapter.wrap(CLIP(16, {**VISION, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, TEXT), 7)
    text = TextTransformer(8, 50, 16, 2, 1)
    for model in (text, Transformer(16, 1, 2)):
        with pytest.raises(
            BackboneError, match=rf"{type(model).__name__} cannot take prompts: it is not a visual tower"
        ):
            LongTailPromptAdapter.wrap(model, 7)
    distilled = timm_tower("deit_tiny_distilled_patch16_224", depth=1, size=32, pool="token", proj=None)
    with pytest.raises(BackboneError, match=r"VisionTransformerDistilled.*two heads.*proj="):
        LongTailPromptAdapter.wrap(distilled, 7)


class OtherForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) + 1


class OtherTimmModel(TimmModel):
    def forward(self, x):
        return super().forward(x) + 1


class OtherTransformer(Transformer):
    def forward(self, x, attn_mask=None):
        return super().forward(x, attn_mask) + 1


class OtherBlock(ResidualAttentionBlock):
    pass


def test_subclasses_with_another_forward_are_refused():
    with pytest.raises(BackboneError, match=r"OtherForward overrides VisionTransformer\.forward.*keep that method"):
        LongTailPromptAdapter.wrap(tiny(cls=OtherForward), 7)
    tower = timm_tower("vit_tiny_patch16_224", depth=1, size=32)
    tower.__class__ = OtherTimmModel
    with pytest.raises(BackboneError, match=r"OtherTimmModel overrides TimmModel\.forward"):
        LongTailPromptAdapter.wrap(tower, 7)
    tower = tiny()
    tower.transformer.__class__ = OtherTransformer
    with pytest.raises(BackboneError, match=r"OtherTransformer overrides Transformer\.forward"):
        LongTailPromptAdapter.wrap(tower, 7)
    tower = tiny()
    tower.transformer.resblocks[1].__class__ = OtherBlock
    adapter = LongTailPromptAdapter.wrap(tower, 7)
    assert type(tower.transformer.resblocks[1]).original is OtherBlock, "any class that the self-check accepts"
    adapter.unwrap()
    assert type(tower.transformer.resblocks[0]) is ResidualAttentionBlock


def test_wrapping_twice_is_refused():
    clip = complete()
    LongTailPromptAdapter.wrap(clip, 7)
    for model in (clip, clip.visual):
        with pytest.raises(BackboneError, match=r"ResidualAttentionBlock already takes prompts.*unwrap"):
            LongTailPromptAdapter.wrap(model, 7)


@pytest.mark.parametrize("cls", [ResidualAttentionBlock, CustomResidualAttentionBlock])
def test_changed_upstream_code_is_refused_and_nothing_changes(monkeypatch, cls):
    monkeypatch.setattr(cls, "forward", lambda self, q_x, **_: q_x + self.mlp(self.ln_2(q_x)))
    tower = tiny(**(CUSTOM if cls is CustomResidualAttentionBlock else {}))
    with pytest.raises(BackboneError, match=rf"Prompts do not work in {cls.__name__}"):
        LongTailPromptAdapter.wrap(tower, 7)
    assert not any(isinstance(module, Prompted) for module in tower.modules())


def test_masks_reach_blocks_without_a_prompt():
    """A prompted class without a prompt equals the original, also with a mask, as text towers call it."""
    block, mask = tiny().transformer.resblocks[0], torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    x = noise(2, 5, 24)
    expected = block(x, attn_mask=mask)
    tower = tiny()
    find_backbone(tower).attach()
    assert torch.equal(tower.transformer.resblocks[0](x, attn_mask=mask), expected)
    assert not torch.allclose(expected, block(x))
