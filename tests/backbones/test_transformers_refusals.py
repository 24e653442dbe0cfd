"""Models of transformers that cannot take prompts, and the description of the others in prompt files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers as hf
from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl
from transformers.models.vit import modeling_vit

from lpt_peft import LongTailPromptAdapter, _prompted
from lpt_peft.backbones import find_backbone
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import Prompted
from tests.backbones.transformers_zoo import ENCODERS, SIZES, build, encoder, inputs


def of(family, **settings):
    return lambda: getattr(hf, f"{family}Model")(getattr(hf, f"{family}Config")(**{**SIZES, **settings}))


MIT = {"mit_hidden_size": 24, "mit_num_attention_heads": 2, "mit_num_hidden_layers": 1, "mit_intermediate_size": 32}
REFUSED = {
    "tuples, and a bias": (of("Data2VecVision"), "Data2VecVisionLayer .*returns a tuple.*Supported"),
    "tuples": (of("FlavaImage"), r"FlavaLayer .*returns a tuple.*Supported"),
    "windows": (of("VitDet"), "VitDetLayer .*cannot be run on tokens alone"),
    "SAM": (of("SamVision"), "SamVisionLayer .*cannot be run on tokens alone"),
    "additional text tokens": (
        of("XCLIPVision", num_frames=2, **MIT),
        "do not work in XCLIPVisionEncoderLayer",
    ),
    "causal": (of("Phi4MultimodalVision"), "do not work in Phi4MultimodalVisionEncoderLayer .*effect"),
    "unknown argument": (
        of("Llama4Vision", vision_output_dim=24, projector_input_dim=24, projector_output_dim=24),
        "Llama4VisionEncoderLayer .*cannot be run on tokens alone.*freqs_ci",
    ),
    "divided in space and time": (of("Timesformer", num_frames=2), "TimesformerLayer .*cannot be run on tokens alone"),
    "groups": (
        lambda: hf.GroupViTVisionModel(hf.GroupViTVisionConfig(**{**SIZES, "depths": [1, 1, 1]})),
        "GroupViTVisionModel has 3 stacks .*hierarchical",
    ),
    "hierarchy": (
        lambda: hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[1, 2])),
        "SwinModel has 2 stacks .*hierarchical.*plain ViT has a single stack",
    ),
    "convolutions": (
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
        "ResNetModel has no stack",
    ),
    "text": (of("Bert", vocab_size=50), "BertModel has no part that takes pixel_values alone"),
    "text with images": (of("Vilt", vocab_size=50), "ViltModel has no part that takes pixel_values alone"),
    "packed": (
        lambda: modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(
            configuration_qwen2_vl.Qwen2VLVisionConfig(
                depth=2, embed_dim=24, hidden_size=24, num_heads=2, mlp_ratio=2, patch_size=8
            )
        ),
        "Qwen2VisionTransformerPretrainedModel has no part that takes pixel_values alone",
    ),
    "feature maps": (
        lambda: hf.Dinov2Backbone(hf.Dinov2Config(**SIZES)),
        "Dinov2Backbone returns feature maps.*AutoModel",
    ),
    "two towers": (
        lambda: hf.VisionTextDualEncoderModel(
            vision_model=hf.ViTModel(hf.ViTConfig(**SIZES)), text_model=hf.ViTModel(hf.ViTConfig(**SIZES))
        ),
        "VisionTextDualEncoderModel has 2 vision towers: wrap a single tower",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason_and_unchanged(case):
    make, message = REFUSED[case]
    with torch.random.fork_rng(devices=[]):
        model = make().eval()
    before = [type(module) for module in model.modules()]
    with pytest.raises(BackboneError, match=message):
        LongTailPromptAdapter.wrap(model, 5)
    assert [type(module) for module in model.modules()] == before


def test_a_part_of_a_model_is_refused():
    layer = encoder("ViT").layers[0]
    with pytest.raises(BackboneError, match=r"ViTLayer is a part .*PreTrainedModel"):
        find_backbone(layer)


def test_wrapper_of_a_timm_model_is_refused():
    vit = encoder("ViT")
    vit.timm_model = torch.nn.Identity()  # as in TimmWrapperModel
    with pytest.raises(BackboneError, match=r"wrap\(model\.timm_model\)"):
        find_backbone(vit)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (of("Yolos", image_size=[32, 32]), {}, r"YolosModel changes tokens .*use_mid_position_embeddings=False"),
        (of("PixtralVision"), {}, r"PixtralVisionModel packs 2 images into 1 token sequences"),
    ],
    ids=["between layers", "packed"],
)
def test_refused_at_the_first_images(make, given, message):
    adapter = LongTailPromptAdapter.wrap(build(make), 5)
    with pytest.raises(BackboneError, match=message):
        adapter(**inputs("ViT"), **given)


def test_second_adapter_is_refused():
    vit = encoder("ViT")
    LongTailPromptAdapter.wrap(vit, 5)
    with pytest.raises(BackboneError, match=r"ViTLayer already takes prompts.*unwrap"):
        LongTailPromptAdapter.wrap(vit, 5)


def test_attention_function_changed_after_wrap():
    vit = encoder("ViT")
    adapter = LongTailPromptAdapter.wrap(vit, 5).eval()
    answer = adapter(**inputs("ViT"))
    vit.set_attn_implementation("eager")
    torch.testing.assert_close(adapter(**inputs("ViT")), answer, rtol=1e-5, atol=1e-5)


def test_reentrant_checkpointing_is_refused():
    vit = encoder("ViT").train()
    adapter = LongTailPromptAdapter.wrap(vit, 5)
    enable = getattr(vit, "activation_checkpointing_enable", None) or vit.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(BackboneError, match=r"Re-entrant.*gradient_checkpointing_enable.*use_reentrant.*False"):
        adapter(**inputs("ViT"))
    vit.eval()
    assert adapter(**inputs("ViT")).logits.shape == (2, 5)


def test_layers_with_a_replaced_forward_are_refused():
    """As accelerate does with a model on several devices."""
    vit = encoder("ViT")
    vit.layers[1].forward = vit.layers[1].forward
    with pytest.raises(BackboneError, match=r"ViTLayer was replaced on the object.*without device_map"):
        LongTailPromptAdapter.wrap(vit, 5)
    assert not any(isinstance(module, Prompted) for module in vit.modules())


def test_self_check_refuses_drift(monkeypatch):
    """An attention that treats the first tokens differently, which no list of names would detect."""
    original = modeling_vit.ViTAttention.forward

    def drifted(self, hidden_states, *args, **kwargs):
        ramp = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)[:, None]
        return original(self, hidden_states * ramp, *args, **kwargs)

    monkeypatch.setattr(modeling_vit.ViTAttention, "forward", drifted)
    vit = encoder("ViT")
    with pytest.raises(BackboneError, match=r"Prompts do not work in ViTLayer of transformers.*difference to token"):
        LongTailPromptAdapter.wrap(vit, 5)
    assert not any(isinstance(module, Prompted) for module in vit.modules())


def test_self_check_refuses_prompts_without_effect(monkeypatch):
    vit = encoder("ViT")
    monkeypatch.setattr(_prompted, "_append", lambda tokens, prompt, axis=1: tokens)
    with pytest.raises(BackboneError, match="difference to token concatenation"):
        LongTailPromptAdapter.wrap(vit, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_self_check_does_not_use_or_change_weights(dtype):
    """The attention of a new model may have no effect: zero projections, a LayerScale of 1e-6."""
    vit = encoder("Dinov2").to(dtype)
    with torch.no_grad():
        for layer in vit.encoder.layer:
            layer.layer_scale1.lambda1.fill_(1e-6)
            for linear in (part for part in layer.attention.modules() if isinstance(part, nn.Linear)):
                linear.weight.zero_()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    modes, state = [module.training for module in vit.modules()], torch.get_rng_state()
    find_backbone(vit).attach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert [module.training for module in vit.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_self_check_keeps_weights_that_are_not_floating_point():
    vit = encoder("ViT")
    vit.layers[0].attention.quantised = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    LongTailPromptAdapter.wrap(vit, 5)


def test_meta_modules():
    with torch.device("meta"):
        vit = hf.ViTModel(hf.ViTConfig(**SIZES))
    LongTailPromptAdapter.wrap(vit, 5)
    assert all(isinstance(layer, Prompted) for layer in vit.layers)


def test_info_names_model_and_origin():
    vit = build(lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, num_labels=7)))
    vit.config._name_or_path, vit.config._commit_hash = "facebook/dinov2-base", "a" * 40
    info = find_backbone(vit).info()
    assert (info.library, info.library_version) == ("transformers", hf.__version__)
    assert info.architecture == "Dinov2ForImageClassification"
    assert (info.hub_id, info.hub_revision) == ("facebook/dinov2-base", "a" * 40)
    assert (info.embed_dim, info.depth, info.num_heads) == (24, 2, 2)
    assert info.num_parameters == sum(p.numel() for p in vit.dinov2.parameters())
    assert info.model_args["model_type"] == "dinov2"
    assert {key: info.model_args[key] for key in ("hidden_size", "image_size", "patch_size")} == {
        "hidden_size": 24,
        "image_size": 32,
        "patch_size": 8,
    }
    assert find_backbone(encoder("ViT")).info().hub_id is None


def test_info_of_a_model_from_a_folder_has_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    vit = encoder("ViT")
    vit.config._name_or_path = "my/model"
    assert find_backbone(vit).info().hub_id is None


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("ViT", 0.5, "bilinear"),
        ("Dinov2", 0.485, "bicubic"),
        ("CLIPVision", 0.48145466, "bicubic"),
        ("SiglipVision", 0.5, "bicubic"),
        ("Siglip2Vision", 0.5, "bilinear"),
        ("InternVLVision", 0.485, "bicubic"),
        ("Radio", 0.0, "bicubic"),
    ],
)
def test_preprocess_of_the_family(name, mean, interpolation):
    """Numbers as in the preprocessor_config.json of the families' best-known checkpoints."""
    preprocess = find_backbone(encoder(name)).preprocess()
    assert preprocess["input_size"] == [3, 32, 32]
    assert preprocess["mean"][0] == pytest.approx(mean)
    assert (preprocess["interpolation"], preprocess["crop_pct"], preprocess["crop_mode"]) == (
        interpolation,
        1.0,
        "center",
    )


@pytest.mark.parametrize("name", [name for name in ENCODERS if ":" not in name])
def test_prompt_files(name, tmp_path):
    """The description of every encoder fits the format, and its prompts can be loaded."""
    adapter = LongTailPromptAdapter.wrap(encoder(name).float(), 5, prompt_length=3, pool_size=4)
    adapter.save_pretrained(tmp_path)
    vit = adapter.unwrap()
    again = LongTailPromptAdapter.from_pretrained(tmp_path, vit)
    assert torch.equal(again.shared.prompts, adapter.shared.prompts)
