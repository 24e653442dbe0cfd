"""ViTClassifier: the feature of the library's own forward, what is trained, and loading into other programs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

from lpt_peft.errors import BackboneError, BackboneMismatchError, ConfigError, InputError, ModelFileError, StateError
from lpt_peft.vit_classifier import ViTClassifier
from tests.backbones.models import ROWS, images, make
from tests.conftest import tiny_vit

METHODS = ["linear_probe", "full"]
rows = pytest.mark.parametrize("row", list(ROWS))
methods = pytest.mark.parametrize("method", METHODS)


def own_feature(row, model, inputs):
    """The feature, from the forward of the model's own library."""
    if row.startswith("timm"):
        return model.forward_head(model.forward_features(inputs), pre_logits=True)
    if row == "torchvision":
        model.heads = torch.nn.Identity()
        return model(inputs)
    if row.startswith("open_clip"):
        return model.encode_image(inputs)
    if row == "transformers SigLIP":
        return model(inputs).pooler_output
    tower = getattr(model, "vit", model)
    return tower(inputs).last_hidden_state[:, 0]


@rows
@methods
def test_the_feature_is_that_of_the_plain_model(row, method):
    model = ViTClassifier.wrap(make(row), 5, method=method)
    out = model(images(), return_output=True)
    expected = own_feature(row, make(row), images())
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(expected.unsqueeze(1), model.head.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(out.logits, 20 * cosine, atol=1e-4, rtol=1e-4)
    assert out.similarity.shape == out.groups.shape == (len(images()), 0)


@rows
def test_full_trains_exactly_the_parameters_behind_the_feature(row):
    """The oracle is autograd: parameters that get a gradient from the plain feature."""
    plain = make(row)
    own_feature(row, plain, images()).square().sum().backward()
    reached = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    model = ViTClassifier.wrap(make(row), 5, method="full")
    trained = {name for name, parameter in model.vit.named_parameters() if parameter.requires_grad}
    assert reached <= trained
    # Poolers of transformers that the feature does not use are part of the tower, as in its fingerprint.
    assert all("pooler" in name or "mask_token" in name for name in trained - reached), trained - reached
    model.train()(images()).sum().backward()
    assert {n for n, p in model.vit.named_parameters() if p.grad is not None} == reached
    assert model.head.weight.grad is not None


@rows
def test_a_linear_probe_trains_the_head_alone(row):
    model = ViTClassifier.wrap(make(row).train(), 5, method="linear_probe").train()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight"]
    assert not any(module.training for module in model.vit.modules())
    before = {name: tensor.clone() for name, tensor in model.vit.state_dict().items()}
    model(images()).sum().backward()
    torch.optim.SGD(model.trainable_parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.vit.state_dict().items())


@methods
def test_batch_norm_statistics_stay_frozen(method):
    stem = [torchvision.models.vision_transformer.ConvStemConfig(8, 3, 8)]
    vit = torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96, conv_stem_configs=stem).train()
    model = ViTClassifier.wrap(vit, 5, method=method).train()
    before = {name: tensor.clone() for name, tensor in vit.named_buffers()}
    assert any("running_mean" in name for name in before)
    model(images())
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.named_buffers())
    assert vit.encoder.layers[0].training == (method == "full")


@methods
def test_drop_path_is_active_in_full_training_only(method):
    model = ViTClassifier.wrap(tiny_vit(drop_path_rate=0.9), 5, method=method, head_dropout=0.0).train()
    first, second = (model(images()) for _ in range(2))
    assert torch.equal(first, second) == (method == "linear_probe")
    model.eval()
    assert torch.equal(model(images()), model(images()))


@rows
def test_unwrap_returns_the_model_as_it_was(row):
    vit = make(row)
    flags = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    kinds = [type(module) for module in vit.modules()]
    model = ViTClassifier.wrap(vit, 5, method="linear_probe")
    model(images())
    assert model.unwrap() is vit
    assert {name: parameter.requires_grad for name, parameter in vit.named_parameters()} == flags
    assert [type(module) for module in vit.modules()] == kinds
    with pytest.raises(StateError, match="was unwrapped"):
        model(images())


@methods
def test_copies_and_compiled_models_compute_the_same(method):
    model = ViTClassifier.wrap(tiny_vit(), 5, method=method).eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), expected)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        vit = tiny_vit()
        vit.set_grad_checkpointing(checkpointing)
        model = ViTClassifier.wrap(vit, 5, method="full", head_dropout=0.0).train()
        with torch.no_grad():
            model.head.weight.fill_(0.5)
        model(images())[:, 0].sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_a_cast_probe_computes_in_its_dtype_and_keeps_its_fingerprint():
    model = ViTClassifier.wrap(tiny_vit(), 5, method="linear_probe")
    before, expected = model.fingerprint, model(images())
    model.cast_backbone(torch.bfloat16)
    assert (model.vit.norm.weight.dtype, model(images()).dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(model(images()), expected, atol=0.5, rtol=0.1)
    assert model.fingerprint == before
    with pytest.raises(ConfigError, match="leave them in float32"):
        ViTClassifier.wrap(tiny_vit(), 5, method="full").cast_backbone(torch.bfloat16)


def trained(method, vit=None):
    """A model with weights that `wrap` does not give."""
    model = ViTClassifier.wrap(tiny_vit() if vit is None else vit, 5, method=method)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@rows
@methods
def test_save_and_load(row, method, tmp_path):
    model = trained(method, make(row))
    names, counts = ["a", "b", "c", "d", "é"], [5, 4, 3, 2, 1]
    model.save_pretrained(tmp_path, label_names=names, class_counts=counts, training={"seed": 1})
    loaded = ViTClassifier.from_pretrained(tmp_path, make(row))
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.method == method
    assert not loaded.training
    assert (loaded.metadata.label_names, loaded.metadata.class_counts) == (tuple(names), tuple(counts))
    assert loaded.metadata.training == {"seed": 1}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"model.safetensors", "config.json"} | ({"head.safetensors"} if method == "full" else set())
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_a_probe_stores_its_head_alone(tmp_path):
    model = trained("linear_probe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert list(tensors) == ["head.weight"]
    assert torch.equal(tensors["head.weight"], model.head.weight)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_timm_loads_a_fully_tuned_vit(tmp_path, name):
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = trained("full", timm.create_model(name, **sizes))
    model.save_pretrained(tmp_path)
    file, expected = str(tmp_path / "model.safetensors"), model(images(), return_output=True).features

    def feature(vit):
        return vit.eval().forward_head(vit.forward_features(images()), pre_logits=True)

    by_hand = timm.create_model(name, num_classes=0, **sizes)
    by_hand.load_state_dict(load_file(file))  # strict
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    for vit in (
        by_hand,
        timm.create_model(name, num_classes=0, checkpoint_path=file, **sizes),
        timm.create_model(name, num_classes=0, **overlay, **sizes),
        timm.create_model(name, num_classes=9, **overlay, **sizes),  # with a new classifier
    ):
        torch.testing.assert_close(feature(vit), expected)
    assert torch.equal(load_file(tmp_path / "head.safetensors")["head.weight"], model.head.weight)


def test_a_probe_refuses_other_weights_and_other_models(tmp_path):
    trained("linear_probe").save_pretrained(tmp_path)
    other = tiny_vit()
    with torch.no_grad():
        other.norm.weight[0] += 1e-3
    with pytest.raises(BackboneMismatchError, match="This head was trained on .* other weights"):
        ViTClassifier.from_pretrained(tmp_path, other)
    with pytest.raises(BackboneMismatchError, match="another architecture|the same architecture with"):
        ViTClassifier.from_pretrained(tmp_path, tiny_vit(depth=3))
    with pytest.raises(BackboneMismatchError, match="The head is for images of 32 x 32 px"):
        ViTClassifier.from_pretrained(tmp_path, tiny_vit(img_size=64))
    assert all(parameter.requires_grad for parameter in other.parameters()), "the refused ViT is as before"


OTHERS = [
    ({"depth": 3}, "missing .*blocks.2"),
    ({"depth": 1}, "unknown .*blocks.1"),
    ({"img_size": 64}, r"pos_embed in .* of shape \(1, 17, 24\), and .*\(1, 65, 24\)"),
    ({"num_heads": 3}, "for 2 attention heads, and this VisionTransformer has 3"),
    ({"embed_dim": 48}, "features of width 24, those of this VisionTransformer have 48"),
]


@pytest.mark.parametrize(("options", "words"), OTHERS)
def test_full_weights_refuse_other_models(tmp_path, options, words):
    trained("full").save_pretrained(tmp_path)
    vit = tiny_vit(**options)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(ModelFileError, match=words):
        ViTClassifier.from_pretrained(tmp_path, vit)
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert all(parameter.requires_grad for parameter in vit.parameters())


def test_full_weights_refuse_another_dtype(tmp_path):
    trained("full").save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"torch.float32 of shape .* and torch.float16"):
        ViTClassifier.from_pretrained(tmp_path, tiny_vit().half())


def test_errors_name_the_rule():
    with pytest.raises(ConfigError, match='"linear_probe" or "full"'):
        ViTClassifier.wrap(tiny_vit(), 5, method="lpt")
    with pytest.raises(ConfigError, match=r"head_dropout=1.0 must be"):
        ViTClassifier.wrap(tiny_vit(), 5, method="full", head_dropout=1.0)
    with pytest.raises(ConfigError, match="has no classifier"):
        ViTClassifier.wrap(tiny_vit(num_classes=0), method="full")
    assert ViTClassifier.wrap(tiny_vit(), method="full").num_classes == 7
    with pytest.raises(BackboneError, match="not a ViT that lpt_peft supports"):
        ViTClassifier.wrap(torch.nn.Linear(2, 2), 5, method="full")
    with pytest.raises(InputError, match="Images are 64 x 64 px"):
        ViTClassifier.wrap(tiny_vit(), 5, method="full")(torch.randn(2, 3, 64, 64))
    with pytest.raises(InputError, match="must be floating point"):
        ViTClassifier.wrap(tiny_vit(), 5, method="full")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_a_diverged_model_is_not_written(tmp_path):
    model = trained("full")
    with torch.no_grad():
        model.vit.norm.weight[0] = float("nan")
    with pytest.raises(StateError, match=r"norm.weight holds NaN"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
