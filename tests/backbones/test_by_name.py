"""Backbones by name: every library, pretrained weights, wrong names and arguments. Nothing is downloaded."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.models._api import WeightsEnum

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import by_name, listing
from lpt_peft.backbones.bundled.glyph_vit import glyph_config, glyph_vit
from lpt_peft.backbones.loading import build, build_backbone, can_build
from lpt_peft.errors import BackboneError, ConfigError, LPTError, MissingExtraError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def assert_takes_prompts(vit, size):
    adapter = LongTailPromptAdapter.wrap(vit, num_classes=3, prompt_length=2, pool_size=4)
    assert adapter(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize("spec", ["glyph_vit", "lpt_peft/glyph_vit"])
def test_bundled(spec):
    vit = build_backbone(spec)
    expected = glyph_vit().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vit.state_dict().items())
    assert not vit.training
    assert_takes_prompts(vit, 32)


@pytest.mark.parametrize(
    "options", [{"pretrained": False}, {"img_size": 64}, {"weights_file": "x"}, {"depth": 2}], ids=str
)
def test_bundled_takes_no_arguments(options):
    with pytest.raises(ConfigError, match="glyph_vit has fixed weights and takes images of 32 px"):
        build_backbone("glyph_vit", **options)


def test_prompt_file_of_the_bundled_backbone():
    adapter = LongTailPromptAdapter.wrap(glyph_vit(), num_classes=3)
    info = adapter.backbone.info()
    recorded = {
        "library": info.library,
        "architecture": info.architecture,
        "pretrained_tag": info.pretrained_tag,
        "model_args": info.model_args,
    }
    assert can_build(recorded)
    assert LongTailPromptAdapter.wrap(build(recorded), num_classes=3).fingerprint == adapter.fingerprint
    with pytest.raises(ConfigError, match="its sizes are not those of the bundled model"):
        build({**recorded, "model_args": {**glyph_config()["model_args"], "depth": 12}})


@pytest.mark.parametrize("prefix", ["", "timm/"])
def test_timm(prefix):
    vit = build_backbone(f"{prefix}test_vit.r160_in1k", pretrained=False, img_size=(32, 48), global_pool="avg")
    assert (vit.patch_embed.img_size, vit.num_classes, vit.global_pool, vit.training) == ((32, 48), 0, "avg", False)
    assert vit.pretrained_cfg["tag"] == "r160_in1k"
    assert_takes_prompts(build_backbone(f"{prefix}test_vit", pretrained=False, img_size=32), 32)


def test_timm_weights_of_a_file(tmp_path):
    source = timm.create_model("test_vit", num_classes=0)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    vit = build_backbone("test_vit", weights_file=tmp_path / "weights.safetensors", pretrained=False)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in vit.state_dict().items())


def test_torchvision(monkeypatch):
    vit = build_backbone("torchvision/vit_b_32", pretrained=False, img_size=32)
    assert vit.image_size == 32
    assert_takes_prompts(vit, 32)
    source, asked = models.vit_b_32().state_dict(), []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: asked.append(self) or source)
    for spec in ("torchvision/vit_b_32", "torchvision/vit_b_32.IMAGENET1K_V1"):
        vit = build_backbone(spec)
        assert torch.equal(vit.class_token, source["class_token"])
    assert asked == [models.ViT_B_32_Weights.DEFAULT, models.ViT_B_32_Weights.IMAGENET1K_V1]


def test_open_clip(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    assert_takes_prompts(build_backbone("open_clip/ViT-S-32", pretrained=False, img_size=64), 64)
    calls = []

    def create_model(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.ModuleDict({"visual": torch.nn.Identity()})

    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: _Clip(create_model(*a, **k)))
    assert isinstance(build_backbone("open_clip/ViT-B-32.openai", img_size=64, cache_dir="x"), torch.nn.Identity)
    assert calls == [(("ViT-B-32",), {"pretrained": "openai", "force_image_size": 64, "cache_dir": "x"})]


class _Clip:
    def __init__(self, parts):
        self.visual = parts["visual"]


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = build_backbone("transformers/vit", pretrained=False, img_size=32, patch_size=8, **sizes)
    assert (type(vit).__name__, vit.config.image_size) == ("ViTModel", 32)
    vit.save_pretrained(tmp_path / "vit")
    loaded = build_backbone(f"transformers/{tmp_path / 'vit'}")
    assert isinstance(loaded, transformers.ViTModel)
    assert not loaded.training
    assert torch.equal(loaded.embeddings.cls_token, vit.embeddings.cls_token)
    random = build_backbone(f"transformers/{tmp_path / 'vit'}", pretrained=False)
    assert any(not torch.equal(value, loaded.state_dict()[name]) for name, value in random.state_dict().items())
    assert_takes_prompts(loaded, 32)


WRONG = {
    "misspelt bundled": ("glif_vit", {}, 'timm has no model "glif_vit".*glyph_vit'),
    "misspelt": ("vit_base_patch16_22", {}, "Similar names: vit_base_patch16_224,"),
    "hyphens": ("vit-base-patch16-224", {}, "Similar names: vit_base_patch16_224,"),
    "name in another library": ("vit_b_16", {}, "Similar names: torchvision/vit_b_16,"),
    "nothing similar": ("qqqq", {}, "Similar names: vit_base_patch16_224,"),
    "empty": ("", {}, 'no model "".*vit_base_patch16_224'),
    "misspelt library": ("torchvison/vit_b_16", {}, 'no model "torchvison/vit_b_16"'),
    "address": ("hf-hub:someone/model", {}, "no model"),
    "wrong tag": ("test_vit.r160", {}, 'timm has no weights "r160" for test_vit.*timm/test_vit.r160_in1k'),
    "no weights": ("vit_giant_patch14_224", {}, "timm has no pretrained weights for vit_giant_patch14_224"),
    "not a ViT": ("resnet18", {}, "timm's ResNet cannot take prompts"),
    "torchvision": ("torchvision/vit_b_6", {}, 'torchvision has no model "vit_b_6".*torchvision/vit_b_16'),
    "torchvision weights": ("torchvision/vit_b_16.V7", {}, 'no weights "V7" for vit_b_16.*vit_b_16.IMAGENET1K_V1'),
    "torchvision, not a ViT": ("torchvision/resnet18", {}, "ResNet cannot take prompts"),
    "open_clip": ("open_clip/ViT-B-33", {}, "open_clip has no model.*open_clip/ViT-B-32"),
    "open_clip without a tag": ("open_clip/ViT-B-32", {}, "several pretrained weights for ViT-B-32.*ViT-B-32.openai"),
    "open_clip, wrong tag": ("open_clip/ViT-B-32.open", {}, 'no weights "open" for ViT-B-32.*Available: openai'),
    "transformers type": ("transformers/dinov", {"pretrained": False}, "Similar names: transformers/dinov2,"),
    "transformers type with weights": ("transformers/vit", {}, "neither a folder nor a Hub repository"),
}


@pytest.mark.parametrize(("spec", "options", "words"), WRONG.values(), ids=WRONG)
def test_wrong_names_are_refused_before_any_download(spec, options, words):
    if spec.startswith("open_clip"):
        pytest.importorskip("open_clip")
    with pytest.raises(BackboneError, match=words):
        build_backbone(spec, **options)


WRONG_ARGUMENTS = {
    "negative": ("test_vit", {"img_size": -5}, "img_size=-5 must be a positive number of pixels"),
    "zero": ("test_vit", {"img_size": 0}, "img_size=0 must be"),
    "boolean": ("test_vit", {"img_size": True}, "img_size=True must be"),
    "three": ("test_vit", {"img_size": (1, 2, 3)}, "must be a positive"),
    "unknown": ("test_vit", {"bogus": 1}, "timm/test_vit cannot be built with {'bogus': 1}: TypeError"),
    "not square": ("torchvision/vit_b_16", {"img_size": (32, 64)}, "take square images only"),
    "torchvision": ("torchvision/vit_b_16", {"bogus": 1}, "torchvision/vit_b_16 cannot be built with"),
    "weights of another library": ("torchvision/vit_b_16", {"weights_file": "x"}, "for models of timm"),
    "no file": ("test_vit", {"weights_file": "/none"}, "weights_file='/none' does not exist"),
}


@pytest.mark.parametrize(("spec", "options", "words"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(spec, options, words):
    with pytest.raises(ConfigError, match=words):
        build_backbone(spec, **{"pretrained": False, **options})


def test_weights_that_cannot_be_loaded(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(BackboneError, match="weights of timm/test_vit cannot be loaded.*weights_file="):
        build_backbone("test_vit", weights_file=tmp_path / "weights.safetensors")


def test_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(by_name, "find_spec", lambda name: None)
    for spec, extra in (("open_clip/ViT-B-32", "open-clip"), ("transformers/a/b", "transformers")):
        with pytest.raises(MissingExtraError, match=rf"lpt_peft\[{extra}\]"):
            build_backbone(spec)


def test_the_listing_includes_the_bundled_backbone():
    entry = listing.find("glyph_vit")
    assert (entry.title, entry.path) == ("glyph_vit", "lpt_peft/glyph_vit")
    assert listing.find("lpt_peft/glyph_vit") == entry or listing.find("lpt_peft/glyph_vit").name == "glyph_vit"
    assert listing.refusal(entry) is None
    assert_takes_prompts(entry.build(), 32)


def test_find_looks_in_the_named_library_only(monkeypatch):
    def fail():
        raise AssertionError("another library was listed")

    monkeypatch.setitem(listing._SOURCES, "transformers", fail)
    assert listing.find("torchvision/vit_b_16").family == "vision_transformer"
    assert listing.find("torchvision/vit_b_6") is None


def test_names_of_plain_vits():
    names = listing.plain_timm_names()
    assert {"vit_base_patch16_224", "deit3_small_patch16_224", "eva02_base_patch14_224"} <= set(names)
    assert not {"resnet18", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224"} & set(names)


def test_every_error_is_an_lpt_error_that_names_the_backbone():
    for spec, options, _ in [*WRONG.values(), *WRONG_ARGUMENTS.values()]:
        with pytest.raises(LPTError) as caught:
            build_backbone(spec, **options)
        assert len(str(caught.value)) < 700
