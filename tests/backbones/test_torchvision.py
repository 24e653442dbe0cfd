"""torchvision's VisionTransformer against token concatenation, and refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.models import vision_transformer as upstream
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock, VisionTransformer

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import Prompted
from tests.backbones.mha_oracle import assert_adapter_is_lpt, make_prompts, noise, seeded, with_prompts

IMAGES = noise(3, 3, 32, 32)
STEM = [ConvStemConfig(out_channels=8, kernel_size=3, stride=2), ConvStemConfig(12, 3, 2), ConvStemConfig(16, 3, 2)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "convolutional stem": {"conv_stem_configs": STEM},
    "representation": {"representation_size": 10},
}
NAMES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def tiny(*, dtype=torch.float64, cls=VisionTransformer, **options):
    settings = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 40}
    return seeded(lambda: cls(**{**settings, "num_classes": 7, **options}), dtype)


def feature_of(vit):
    """The input of `heads` in torchvision's own forward."""
    headless = copy.copy(vit)
    headless._modules = {**vit._modules, "heads": nn.Identity()}
    return headless


def features(vit, images, prompts):
    backbone = find_backbone(vit)
    backbone.attach()
    return backbone.pool(backbone.run(backbone.embed(images), 0, prompts))


@pytest.mark.parametrize("batch", [None, 3], ids=["shared", "per-image"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_concatenation(options, training, batch):
    vit = tiny(**options).train(training)
    plain = feature_of(vit)(IMAGES)
    prompts = make_prompts(24, batch=batch)
    expected, expected_gradients = with_prompts(vit.encoder.layers, feature_of(vit), IMAGES, prompts)
    got = features(vit, IMAGES, prompts)
    assert got.shape == (3, 24)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for actual, value in zip(torch.autograd.grad((got**2).sum(), prompts), expected_gradients, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-11, atol=1e-11)
    assert (got - plain).abs().max() > 1e-3, "the prompt had no effect"


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_adapter_in_both_phases(options):
    vit = tiny(**options)
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(vit), pool_size=5, shared_layers=1, query="final")
    assert adapter(IMAGES).shape == (3, 7)
    assert_adapter_is_lpt(adapter, vit.encoder.layers, feature_of(vit), IMAGES)


def test_dropouts_keep_their_places():
    """Each dropout is replaced by a function for the oracle."""
    vit = tiny()
    for module in list(vit.encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Softsign())
    assert sum(isinstance(module, nn.Softsign) for module in vit.modules()) == 7
    prompts = make_prompts(24, batch=3)
    expected, _ = with_prompts(vit.encoder.layers, feature_of(vit), IMAGES, prompts)
    torch.testing.assert_close(features(vit, IMAGES, prompts), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"attention_dropout": 0.5}], ids=["dropout", "attention"])
def test_dropout_in_training_only(rates):
    prompts = make_prompts(24, batch=None)
    vit = tiny(**rates)
    expected, _ = with_prompts(vit.encoder.layers, feature_of(vit), IMAGES, prompts)
    got = features(vit, IMAGES, prompts)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.random.fork_rng(devices=[]):
        backbone = find_backbone(vit.train())
        once, twice = (backbone.pool(backbone.run(backbone.embed(IMAGES), 0, prompts)) for _ in range(2))
    assert not torch.allclose(once, twice, atol=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_neutral_outside_the_adapter_and_after_unwrap(training):
    vit = tiny().train(training)
    vit.heads.requires_grad_(False)
    keys, classes = list(vit.state_dict()), [type(module) for module in vit.modules()]
    tensors = copy.deepcopy(vit.state_dict())
    trainable = [parameter.requires_grad for parameter in vit.parameters()]
    plain = vit(IMAGES)
    # Freezing alone changes the kernels in nn.MultiheadAttention, and with them the last bits.
    frozen = copy.deepcopy(vit).requires_grad_(False)(IMAGES)
    adapter = LongTailPromptAdapter.wrap(vit)
    adapter(IMAGES)
    assert torch.equal(vit(IMAGES), frozen)
    assert list(vit.state_dict()) == keys
    assert adapter.unwrap() is vit
    assert torch.equal(vit(IMAGES), plain)
    assert [type(module) for module in vit.modules()] == classes
    assert [parameter.requires_grad for parameter in vit.parameters()] == trainable
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_deepcopy_pickle_and_compile(phase):
    adapter = LongTailPromptAdapter.wrap(tiny(), pool_size=5)
    adapter.phase = phase
    expected = adapter(IMAGES)
    assert torch.equal(copy.deepcopy(adapter)(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(IMAGES), expected)
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_autocast():
    vit = tiny(dtype=torch.float32)
    prompts = [prompt.detach().float().requires_grad_() for prompt in make_prompts(24, batch=None)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = with_prompts(vit.encoder.layers, feature_of(vit), IMAGES.float(), prompts)
        got = features(vit, IMAGES.float(), prompts)
        gradients = torch.autograd.grad((got**2).sum(), prompts)
    assert (got - expected).norm() < 0.02 * expected.norm()
    for actual, value in zip(gradients, expected_gradients, strict=True):
        assert (actual - value).norm() < 0.1 * value.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_weights(dtype):
    vit = tiny().to(dtype)
    out = LongTailPromptAdapter.wrap(vit, pool_size=5)(IMAGES.to(dtype))
    assert out.shape == (3, 7)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("merged", [False, True], ids=["around", "merged"])
@pytest.mark.parametrize("targets", [["self_attention"], r".*mlp\.[03]"], ids=["attention", "mlp"])
def test_lora_and_prompts(targets, merged, recwarn):
    """PEFT wraps the nn.MultiheadAttention; the oracle is the model with LoRA, by concatenation."""
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    lora = get_peft_model(tiny(), config).double()
    vit = lora.merge_and_unload() if merged else lora.get_base_model()
    prompts = make_prompts(24, batch=3)
    expected, expected_gradients = with_prompts(vit.encoder.layers, feature_of(vit), IMAGES, prompts)
    without_lora, _ = with_prompts((plain := tiny()).encoder.layers, feature_of(plain), IMAGES, prompts)
    assert not torch.allclose(expected, without_lora, atol=1e-3)
    recwarn.clear()
    got = features(vit, IMAGES, prompts)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for actual, value in zip(torch.autograd.grad((got**2).sum(), prompts), expected_gradients, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-11, atol=1e-11)
    drifting = not merged and targets == ["self_attention"]
    assert any("Merge the LoRA before wrap" in str(warning.message) for warning in recwarn) == drifting


@pytest.mark.parametrize("name", NAMES)
def test_every_name_wraps_and_is_identified_by_its_sizes(name):
    with torch.device("meta"):
        vit = torchvision.models.get_model(name)
    backbone = find_backbone(vit)
    info = backbone.info()
    assert (info.library, info.library_version) == ("torchvision", torchvision.__version__)
    assert (info.architecture, dict(info.model_args)) == (name, {"image_size": 224})
    assert (
        (info.embed_dim, info.depth)
        == (backbone.dim, len(backbone.blocks))
        == (vit.hidden_dim, len(vit.encoder.layers))
    )
    assert info.num_heads == vit.encoder.layers[0].self_attention.num_heads
    assert info.num_parameters == sum(p.numel() for n, p in vit.named_parameters() if not n.startswith("heads."))
    adapter = LongTailPromptAdapter.wrap(vit)
    assert adapter.prompt_config.num_classes == 1000
    assert all(isinstance(block, Prompted) for block in vit.encoder.layers)


@pytest.mark.parametrize("options", [{}, {"conv_stem_configs": STEM}], ids=["sizes of no name", "stem"])
def test_unknown_sizes_are_recorded_in_full(options):
    info = find_backbone(tiny(**options)).info()
    assert info.architecture == "VisionTransformer"
    rebuilt = VisionTransformer(**info.model_args, **options)
    found = sum(p.numel() for n, p in rebuilt.named_parameters() if not n.startswith("heads."))
    found += sum(b.numel() for b in rebuilt.buffers())
    assert found == info.num_parameters


@pytest.mark.parametrize(
    ("heads", "classes"),
    [(nn.Identity(), 0), (nn.Linear(24, 3), 3), (nn.Sequential(nn.Dropout(), nn.Linear(24, 4)), 4)],
)
def test_classes_of_replaced_heads(heads, classes):
    vit = tiny(dtype=torch.float32)
    vit.heads = heads
    assert find_backbone(vit).num_classes == classes


def test_fingerprint_covers_all_but_the_heads():
    vit = tiny(representation_size=10)
    before = fingerprint(find_backbone(vit).frozen_tensors())
    with torch.no_grad():
        for parameter in vit.heads.parameters():
            parameter.add_(1)
    assert fingerprint(find_backbone(vit).frozen_tensors()) == before
    with torch.no_grad():
        vit.encoder.ln.bias[0] += 1
    assert fingerprint(find_backbone(vit).frozen_tensors()) != before


def test_preprocess_equals_that_of_the_weights():
    with torch.device("meta"):
        vit = torchvision.models.vit_b_16()
    ours, theirs = find_backbone(vit).preprocess(), torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert ours["input_size"] == [3, *theirs.crop_size * 2]
    assert (ours["mean"], ours["std"], ours["interpolation"]) == (theirs.mean, theirs.std, theirs.interpolation.value)
    assert ours["crop_pct"] == theirs.crop_size[0] / theirs.resize_size[0]
    assert ours["crop_mode"] == "center"
    assert find_backbone(tiny()).preprocess()["input_size"] == [3, 32, 32]


def test_prompt_file_round_trip(tmp_path):
    adapter = LongTailPromptAdapter.wrap(tiny(dtype=torch.float32), pool_size=5)
    adapter.phase = "group"
    adapter.save_pretrained(tmp_path)
    again = LongTailPromptAdapter.from_pretrained(tmp_path, tiny(dtype=torch.float32))
    assert torch.equal(again(IMAGES.float()), adapter(IMAGES.float()))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_t", "windows"),
        ("swin_v2_t", "windows"),
        ("maxvit_t", "windows"),
        ("resnet18", "no attention over tokens"),
        ("convnext_tiny", "no attention over tokens"),
        ("mvit_v2_s", "shrink between stages"),
    ],
)
def test_refusals_have_a_reason_and_an_alternative(name, why):
    options = {"input_size": (224, 224)} if name == "maxvit_t" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options)
    with pytest.raises(BackboneError, match=rf"torchvision's \w+ cannot take prompts: .*{why}.*vit_b_16"):
        LongTailPromptAdapter.wrap(model, 5)


class OtherForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) + 1


class OtherName(VisionTransformer):
    pass


class OtherEncoder(upstream.Encoder):
    def forward(self, input):
        return super().forward(input) + 1


class OtherBlock(EncoderBlock):
    pass


def test_subclasses_that_override_the_forward_are_refused():
    with pytest.raises(BackboneError, match=r"OtherForward overrides VisionTransformer\.forward.*subclasses that keep"):
        LongTailPromptAdapter.wrap(tiny(cls=OtherForward))
    vit = tiny()
    vit.encoder.__class__ = OtherEncoder
    with pytest.raises(BackboneError, match=r"OtherEncoder overrides Encoder\.forward"):
        LongTailPromptAdapter.wrap(vit)
    vit = tiny(cls=OtherName)
    assert find_backbone(vit).info().architecture == "OtherName"
    vit.encoder.layers[1].__class__ = OtherBlock
    adapter = LongTailPromptAdapter.wrap(vit)
    assert type(vit.encoder.layers[1]).original is OtherBlock, "blocks may be of any class that the self-check accepts"
    adapter.unwrap()
    assert type(vit.encoder.layers[0]) is EncoderBlock


def test_wrapping_twice_is_refused():
    vit = tiny()
    LongTailPromptAdapter.wrap(vit)
    with pytest.raises(BackboneError, match=r"EncoderBlock already takes prompts.*unwrap"):
        LongTailPromptAdapter.wrap(vit)


def test_changed_blocks_are_detected_and_left_unchanged(monkeypatch):
    monkeypatch.setattr(EncoderBlock, "forward", lambda self, input: input + self.mlp(self.ln_2(input)))
    vit = tiny()
    with pytest.raises(BackboneError, match=r"Prompts do not work in EncoderBlock"):
        LongTailPromptAdapter.wrap(vit)
    assert not any(isinstance(module, Prompted) for module in vit.modules())
    assert all(parameter.requires_grad for parameter in vit.parameters())
