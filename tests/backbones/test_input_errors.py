"""Errors of torch and the model's library for wrong input become LPTErrors that name input, rule and remedy."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import BackboneError, ConfigError, InputError, LPTError, StateError
from lpt_peft.prompting import Prompted, attentions_of
from tests.backbones.models import ROWS, build, images, make, on_meta, rows, wrap
from tests.conftest import tiny_vit
from tests.host_reads import count_host_reads

ANY_SIZE = {"timm NaFlexViT", "transformers DINOv3", "open_clip, timm tower"}


@pytest.fixture(scope="module")
def adapters():
    built = {}

    def get(row):
        if row not in built:
            built[row] = build(row)
        return built[row]

    return get


WRONG = {
    "uint8": (lambda x: (x * 50).to(torch.uint8), r"Images are uint8; they must be floating point.*ToDtype"),
    "int64": (lambda x: x.long(), r"Images are int64; they must be floating point"),
    "bool": (lambda x: x > 0, r"Images are bool; they must be floating point"),
    "double": (lambda x: x.double(), r"Images are float64, the model is float32.*images\.to\(adapter\.dtype\)"),
    "half": (lambda x: x.half(), r"Images are float16, the model is float32"),
    "meta": (lambda x: x.to("meta"), r"Images are float32 on meta, the model is on cpu.*images\.to\(adapter\.device\)"),
    "grey": (lambda x: x[:, :1], r"Images have 1 channels.*takes \(B, 3, \d+, \d+\).*expand\(-1, 3, -1, -1\)"),
    "four channels": (lambda x: torch.cat([x, x[:, :1]], 1), r"Images have 4 channels.*takes \(B, 3, \d+, \d+\)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), r"Images have 32 channels.*images\.permute\(0, 3, 1, 2\)"),
    "single image": (lambda x: x[0], r"Images have shape \(3, 32, 32\).*images\.unsqueeze\(0\)"),
    "five dimensions": (lambda x: x[None], r"Images have shape \(1, 2, 3, 32, 32\)"),
    "larger": (lambda x: torch.randn(2, 3, 64, 64), r"Images are 64 x 64 px.*takes \(B, 3, \d+, \d+\).*Resize"),
    "smaller": (lambda x: x[..., :16, :16], r"Images are 16 x 16 px.*takes \(B, 3, \d+, \d+\)"),
    "not square": (lambda x: torch.randn(2, 3, 32, 48), r"Images are 32 x 48 px"),
}


@rows
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_images(row, wrong, adapters):
    change, words = WRONG[wrong]
    if row in ANY_SIZE and "px" in words:
        pytest.skip("takes images of any size")
    if row.startswith("transformers") and wrong in {"double", "half"}:
        pytest.skip("casts images")
    adapter = adapters(row)
    for phase in ("shared", "group"):
        adapter.phase = phase
        with torch.no_grad(), pytest.raises(InputError, match=words) as caught:
            adapter(change(images()))
        assert len(str(caught.value)) < 600
    if wrong not in {"uint8", "int64", "bool"} or not row.startswith("transformers"):  # transformers casts raw pixels
        with torch.no_grad(), adapter.disable_adapter(), pytest.raises(InputError, match=words):
            adapter(change(images()))


@rows
def test_images_that_are_not_tensors(row, adapters):
    adapter = adapters(row)
    with pytest.raises(InputError, match=r"Images are a list, and .* needs a tensor.*torch\.stack"):
        adapter([images()[0], images()[1]])
    with pytest.raises(LPTError, match="needs images: call adapter"):
        adapter()


@rows
def test_batches_and_arguments_of_other_libraries(row, adapters):
    adapter = adapters(row)
    for phase in ("shared", "group"):
        adapter.phase = phase
        with pytest.raises(
            InputError, match=r"Images are a dict with the keys pixel_values.*call adapter\(\*\*batch\)"
        ):
            adapter({"pixel_values": images()})
        with pytest.raises(InputError, match=r"Images are a dict with the keys x, y.*pass the tensor"):
            adapter({"x": images(), "y": images()})
        if row.startswith("transformers"):
            continue  # its forwards accept and ignore unknown keywords
        with pytest.raises(InputError, match=r"The forward of \w+ .*'unknown'.*arguments of that forward") as caught:
            adapter(images(), unknown=1)
        assert "embed" not in str(caught.value)


def test_a_failure_with_right_images_keeps_its_error():
    adapter = build("timm ViT")
    adapter.vit.norm = nn.LayerNorm(7)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        adapter(images())


def test_out_of_memory_is_not_explained(monkeypatch):
    adapter = build("timm ViT")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(adapter.backbone, "embed", fail)
    with pytest.raises(torch.OutOfMemoryError):
        adapter(torch.randn(2, 3, 64, 64))


def test_a_right_forward_checks_nothing(monkeypatch):
    adapter = build("timm ViT")
    monkeypatch.setattr("lpt_peft.call.explain_failure", lambda *_: pytest.fail("called"))
    with torch.no_grad(), count_host_reads() as reads:
        adapter(images())
    assert list(reads) == []


def test_models_that_do_not_describe_their_images_keep_the_error(monkeypatch):
    adapter = build("timm ViT")

    def fail():
        raise AttributeError("no image size")

    monkeypatch.setattr(adapter.backbone, "preprocess", fail)
    with pytest.raises(AssertionError, match="height"):
        adapter(torch.randn(2, 3, 64, 64))


def test_videos_and_patches_keep_the_error():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    video = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**sizes, image_size=32, patch_size=16, num_frames=4, tubelet_size=2)
    ).eval()
    adapter = LongTailPromptAdapter.wrap(video, 3)
    assert adapter(torch.randn(1, 4, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        adapter(torch.randn(1, 8, 3, 32, 32))
    adapter = build("timm NaFlexViT")
    with pytest.raises(InputError, match="Patches of NaFlexVit need patch_coord"):
        adapter({"patches": torch.randn(1, 4, 192)})
    with pytest.raises(InputError, match="Images are float64, the model is float32"):
        adapter(
            {
                "patches": torch.randn(1, 4, 192).double(),
                "patch_coord": torch.zeros(1, 4, 2, dtype=torch.long),
                "patch_valid": torch.ones(1, 4, dtype=torch.bool),
            }
        )


def test_dynamic_image_size_is_not_refused():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, dynamic_img_size=True).eval()
    adapter = LongTailPromptAdapter.wrap(vit, num_classes=3)
    assert adapter(torch.randn(1, 3, 64, 48)).shape == (1, 3)
    with pytest.raises(InputError, match="Images are 64 x 50 px"):
        adapter(torch.randn(1, 3, 64, 50))


LABELS = {
    "column": (torch.tensor([[0], [1]]), r"int64 of shape \(2, 1\): pass labels\.squeeze\(1\)"),
    "out of range": (torch.tensor([0, 9]), "labels has values from 0 to 9, and the classes are 0 to 4"),
    "negative": (torch.tensor([-1, 0]), "labels has values from -1 to 0"),
    "float": (torch.tensor([0.0, 1.0]), r"pass labels\.long\(\)"),
    "int32": (torch.tensor([0, 1], dtype=torch.int32), r"pass labels\.long\(\)"),
    "bool": (torch.tensor([True, False]), r"pass labels\.long\(\)"),
    "other batch": (torch.tensor([0, 1, 2]), r"labels must be class indices \(2,\) int64"),
    "integer one-hot": (torch.eye(5, dtype=torch.long)[:2], r"pass labels\.float\(\)"),
    "other number of classes": (torch.rand(2, 4), r"probabilities \(2, 5\)"),
    "list": ([0, 1], r"labels is a list: pass torch\.tensor\(labels\)"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrong", LABELS)
def test_wrong_labels(wrong, training):
    labels, words = LABELS[wrong]
    adapter = build("timm ViT", "group").train(training)
    for criterion in (adapter.criterion, nn.CrossEntropyLoss()):
        adapter.criterion = adapter.eval_criterion = criterion
        with pytest.raises(InputError, match=words):
            adapter(images(), labels=labels)


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("wrong", LABELS)
def test_wrong_labels_of_the_default_criterion_called_directly(wrong, phase):
    labels, words = LABELS[wrong]
    adapter = build("timm ViT", phase)
    with pytest.raises(InputError, match=words):
        adapter.criterion(adapter(images(), return_output=True), labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "labels is None: the batch has no labels"),
        ({"y": torch.tensor([0, 1])}, "labels is a dict: pass the tensor of labels in it"),
        ((torch.tensor([0, 1]), torch.tensor([1, 0]), 0.5), r"labels is a tuple of tensors.*probabilities \(2, 5\)"),
        (torch.eye(5)[:2] - 1, r"labels\[0\] must be probabilities, .* smallest value is -1 and its sum is -4"),
        (torch.stack([torch.eye(5)[0], torch.full((5,), torch.nan)]), r"labels\[1\] must be probabilities.* nan"),
        (torch.ones(2, 5), r"its sum is 5: .*softmax.*divide multi-label rows"),
    ],
)
def test_labels_that_only_the_default_criterion_refuses(labels, words):
    adapter = build("timm ViT", "group")
    with pytest.raises(InputError, match=words):
        adapter.criterion(adapter(images(), return_output=True), labels)


def test_the_default_criterion_on_probabilities():
    adapter = build("timm ViT", "group")
    output, labels = adapter(images(), return_output=True), torch.eye(5)[:2] * 0.7 + 0.3 * torch.eye(5)[1:3]
    expected = -(labels * output.logits.log_softmax(1)).sum(1).mean() + 1 - output.similarity.mean()
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(adapter.criterion(output, labels.to(dtype)), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(adapter.criterion(output, labels), expected)


def test_labels_that_cross_entropy_takes():
    adapter = build("timm ViT")
    for labels in (torch.tensor([0, 4]), torch.tensor([0, -100]), torch.eye(5)[:2]):
        assert adapter(images(), labels=labels).loss.isfinite()


def test_errors_of_a_criterion_with_right_labels_are_kept():
    def fail(output, labels):
        raise ZeroDivisionError

    adapter = build("timm ViT")
    adapter.eval_criterion = fail
    with pytest.raises(ZeroDivisionError):
        adapter(images(), labels=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"criterion=None must be a function or module"):
        adapter.criterion = None


@pytest.mark.parametrize("dropout", ["0.1", None, 1, -0.1, float("nan")])
def test_wrong_dropout(dropout):
    vit = tiny_vit()
    with pytest.raises(ConfigError, match="head_dropout=.* must be a number of at least 0 and below 1"):
        LongTailPromptAdapter.wrap(vit, head_dropout=dropout)
    assert all(parameter.requires_grad for parameter in vit.parameters())


# The model


@rows
def test_calls_of_an_adapter_on_the_meta_device(row):
    model = on_meta(ROWS[row].make).eval()
    if not all(parameter.is_meta for parameter in model.parameters()):
        pytest.skip("cannot be built on the meta device")
    with pytest.raises(InputError, match="on cpu, and the model has no weights yet.*to_empty"):
        wrap(model)(images())


@rows
def test_blocks_that_were_removed_or_added(row):
    adapter = build(row)
    holder = next(
        module
        for module in adapter.vit.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and adapter.backbone.blocks[0] in list(module)
    )
    depth, last = len(holder), holder[-1]
    del holder[-1]
    with pytest.raises(
        StateError, match=f"has {depth - 1} blocks, and {depth} when it was wrapped.*wrap the model again"
    ):
        adapter(images())
    holder.append(last)
    holder.append(last)
    with pytest.raises(StateError, match=f"has {depth + 1} blocks"):
        adapter(images())
    del holder[-1]
    assert adapter(images()).shape == (2, 5)
    del holder[-1]
    adapter.unwrap()
    assert not any(isinstance(module, Prompted) for module in (*adapter.backbone.model.modules(), *last.modules()))


@rows
def test_a_block_that_was_replaced(row):
    adapter = build(row)
    block = adapter.backbone.blocks[1]
    holder = next(
        module
        for module in adapter.vit.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and block in list(module)
    )
    holder[1] = nn.Identity()
    with pytest.raises(StateError, match=r"Block 1, a Identity, takes no prompts.*unwrap\(\) and wrap"):
        adapter(images())


@pytest.mark.parametrize("change", ["replaced", "deleted"])
@rows
def test_an_attention_that_was_replaced(row, change):
    adapter = build(row)
    block = adapter.backbone.blocks[1]
    name = next(name for name, module in block.named_modules() if name and module is attentions_of(block)[0])
    holder, _, leaf = name.rpartition(".")
    if change == "replaced":
        setattr(block.get_submodule(holder), leaf, nn.Identity())
    else:
        delattr(block.get_submodule(holder), leaf)
    with pytest.raises(LPTError, match=r"replaced after wrap.*unwrap\(\) and wrap"):
        adapter(images())


def test_a_vit_that_was_replaced():
    adapter = build("timm ViT")
    vit = adapter.vit
    adapter.vit = make("timm ViT")
    with pytest.raises(StateError, match=r"adapter\.vit was replaced by another VisionTransformer.*Wrap that model"):
        adapter(images())
    adapter.vit = nn.Sequential(vit)  # a wrapper around the same model, as of PEFT or FSDP
    assert adapter(images()).shape == (2, 5)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_an_adapter_that_was_created_in_inference_mode_trains(phase):
    vit = tiny_vit()
    with torch.inference_mode():
        adapter = LongTailPromptAdapter.wrap(vit, 3)
    adapter.phase = phase
    output = adapter.train()(images(), return_output=True)
    (output.logits.sum() + output.similarity.sum()).backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable_parameters())


def test_training_on_a_vit_that_was_created_in_inference_mode():
    with torch.inference_mode():
        vit = tiny_vit()
    adapter = LongTailPromptAdapter.wrap(vit, 3)
    with torch.no_grad():
        assert adapter(images()).shape == (2, 3)
    with pytest.raises(StateError, match=r"created in torch\.inference_mode\(\), so no gradient passes them.*Build"):
        adapter.train()(images())


@rows
def test_scripting(row):
    adapter = build(row)
    with pytest.raises(StateError, match=r"torch\.jit\.script does not support prompts.*torch\.compile"):
        torch.jit.script(adapter)
    with pytest.raises(StateError, match=r"does not support the prompts in .*unwrap\(\)"):
        torch.jit.script(adapter.backbone.blocks[0])


def test_models_with_scripted_parts():
    with pytest.raises(BackboneError, match="its forward is fixed"):
        LongTailPromptAdapter.wrap(torch.jit.script(nn.Linear(2, 2)))
    vit = tiny_vit()
    vit.blocks[1] = torch.jit.script(vit.blocks[1])
    with pytest.raises(BackboneError, match="is scripted, so its forward is fixed"):
        LongTailPromptAdapter.wrap(vit)
    assert not any(isinstance(module, Prompted) for module in vit.modules())


@rows
def test_checkpoint_wrapped_blocks_are_refused(row):
    model = make(row)
    adapter = wrap(model)
    blocks = set(adapter.backbone.blocks)
    adapter.unwrap()
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)
    with pytest.raises(BackboneError, match="CheckpointWrapper recomputes a block.*Wrap the model first"):
        wrap(model)
    assert not any(isinstance(module, Prompted) for module in model.modules())


def test_checkpoint_wrapper_around_the_model():
    with pytest.raises(BackboneError, match=r"CheckpointWrapper cannot take prompts.*wrap the model inside"):
        LongTailPromptAdapter.wrap(checkpoint_wrapper(tiny_vit()))


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_checkpoint_wrappers_after_wrap_give_the_same_gradients(phase):
    gradients = []
    for wrapped in (False, True):
        adapter = build("timm ViT", phase).train()
        if wrapped:
            blocks = set(adapter.vit.blocks)
            apply_activation_checkpointing(adapter, check_fn=blocks.__contains__)
            assert type(adapter.vit.blocks[0]).__name__ == "CheckpointWrapper"
        losses = [adapter(images(seed=seed)).square().sum() for seed in range(2)]  # two passes before one backward
        sum(losses).backward()
        gradients.append([p.grad for p in adapter.trainable_parameters()])
    for actual, value in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, value)


@rows
def test_data_parallel(row):
    replica = build(row)._replicate_for_data_parallel()
    with pytest.raises(StateError, match=r"nn\.DataParallel.*DistributedDataParallel\(adapter\)"):
        replica(images())


def test_nested_wraps():
    adapter = build("timm ViT")
    for model, words in (
        (adapter, r"already has prompts.*unwrap\(\)"),
        (adapter.vit, r"already takes prompts.*unwrap\(\)"),
        (copy.deepcopy(adapter.vit), r"copy of a wrapped model.*copy the model before wrap"),
        (pickle.loads(pickle.dumps(adapter.vit)), r"copy of a wrapped model"),
        (nn.DataParallel(adapter.vit), r"DataParallel cannot take prompts"),
        (nn.Sequential(nn.Identity(), tiny_vit()), r"contains a VisionTransformer.*\.get_submodule\(\"1\"\)"),
        (nn.ModuleDict({"model": nn.ModuleDict({"vit": tiny_vit()})}), r"get_submodule\(\"model\.vit\"\)"),
        (nn.Sequential(nn.Identity(), adapter), r"contains an adapter"),
    ):
        with pytest.raises(BackboneError, match=words):
            LongTailPromptAdapter.wrap(model, 3)
    assert adapter(images()).shape == (2, 5)


# After unwrap


@rows
def test_every_attribute_of_an_unwrapped_adapter_is_a_value_or_an_attribute_error(row):
    adapter = build(row)
    adapter.unwrap()
    for name in dir(adapter):
        getattr(adapter, name, None)  # any error but AttributeError fails
    assert not hasattr(adapter, "fingerprint")
    assert not hasattr(adapter, "device")
    inspect.getmembers(adapter)
    repr(adapter)
    with pytest.raises(StateError, match="unwrapped"):
        _ = adapter.fingerprint
    for call in (
        adapter,
        adapter.features,
        lambda _: adapter.cast_backbone(torch.bfloat16),
        lambda _: adapter.unwrap(),
    ):
        with pytest.raises(StateError, match="unwrapped"):
            call(images())


@rows
def test_copies_of_wrapped_models_compute_the_same(row):
    adapter = build(row)
    with torch.no_grad():
        expected = adapter(images())
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(twin(images()), expected)
            vit = twin.unwrap()
            assert not any(isinstance(module, Prompted) for module in vit.modules())
            assert wrap(vit)(images()).shape == (2, 5)
