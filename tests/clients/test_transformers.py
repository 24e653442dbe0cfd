"""transformers' Trainer and pipeline with an adapter as their model."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from lpt_peft import AGCLLoss, LongTailPromptAdapter, LPTLoss
from lpt_peft.errors import InputError, StateError
from tests.backbones.models import build, images, make

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.modeling_outputs import ImageClassifierOutput  # noqa: E402

NAMES = ["cat", "dog", "emu"]
OWN = {"shared.prompts", "pool.prompts", "pool.keys", "pool.usage", "head.weight", "phase_index", "block_k_query"}
phases = pytest.mark.parametrize("phase", ["shared", "group"])


def vit(**options):
    """A tiny ViT of transformers; the same weights in every call."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, **{**labels, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrap(phase="shared", model=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = LongTailPromptAdapter.wrap(model or vit(), prompt_length=3, pool_size=4, head_dropout=0.0, **options)
    adapter.phase = phase
    return adapter


class Rows(torch.utils.data.Dataset):
    """Three classes that a linear probe can separate."""

    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(0)
        self.labels = [index % 3 for index in range(count)]
        means = torch.randn(3, 3, 16, 16, generator=generator)
        self.images = [means[label] + 0.3 * torch.randn(3, 16, 16, generator=generator) for label in self.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def trainer(adapter, folder, **options):
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "dataloader_num_workers": 0,
    }
    given = {name: options.pop(name) for name in ("compute_loss_func", "callbacks") if name in options}
    return Trainer(
        model=adapter,
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=Rows(),
        eval_dataset=Rows(12),
        compute_metrics=lambda got: {"accuracy": float((got.predictions.argmax(1) == got.label_ids).mean())},
        **given,
    )


# Calls


@phases
@pytest.mark.parametrize("row", ["transformers ViT classifier", "timm ViT", "torchvision"])
def test_keyword_calls_return_the_class_of_transformers(row, phase):
    adapter, labels = build(row, phase), torch.tensor([1, 4])
    logits = adapter(images())
    assert isinstance(logits, torch.Tensor)
    out = adapter(pixel_values=images())
    assert type(out) is ImageClassifierOutput
    assert out.loss is None
    assert torch.equal(out.logits, logits)
    for answer in (adapter(pixel_values=images(), labels=labels), adapter(images(), labels=labels)):
        expected = F.cross_entropy(logits, labels)
        if phase == "group":
            expected = expected + 1 - adapter(images(), return_output=True).similarity.mean()
        torch.testing.assert_close(answer.loss, expected)
        assert torch.equal(answer.logits, logits)
    assert torch.equal(adapter(pixel_values=images(), return_output=True).logits, logits)
    assert torch.equal(adapter.features(images()), adapter(images(), return_output=True).features)


def test_criteria_of_lpt_peft_and_torch():
    adapter, labels = build("timm ViT", "group").train(), torch.tensor([1, 4, 0, 0])
    adapter.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    got = adapter(images(4), labels=labels)
    torch.testing.assert_close(got.loss, F.cross_entropy(got.logits, labels, label_smoothing=0.1))
    names = set(adapter.state_dict())
    adapter.criterion = LPTLoss([5, 4, 3, 2, 1], epochs=2, noise_scale=0.0)
    adapter.head_drop.p = 0.0
    assert set(adapter.state_dict()) == names
    got = adapter(images(4), labels=labels)
    torch.testing.assert_close(got.loss, adapter.criterion(adapter(images(4), return_output=True), labels))


def test_replacing_a_criterion():
    adapter, labels = build("timm ViT", "group").eval(), torch.tensor([1, 4, 0, 0])
    first = adapter(images(4), labels=labels)
    ours, own = adapter.criterion, AGCLLoss([5, 4, 3, 2, 1])
    for criterion, expected in (
        (own, AGCLLoss([5, 4, 3, 2, 1]).eval()(first.logits, labels)),
        (ours, first.loss),
        (nn.NLLLoss(), F.nll_loss(first.logits, labels)),
        (F.cross_entropy, F.cross_entropy(first.logits, labels)),
        (LabelSmoothingCrossEntropy(0.1), F.cross_entropy(first.logits, labels, label_smoothing=0.1)),
    ):
        adapter.criterion = adapter.eval_criterion = criterion
        assert not getattr(criterion, "training", False), "a loss takes the adapter's mode"
        torch.testing.assert_close(adapter(images(4), labels=labels).loss, expected)


@phases
def test_evaluation_has_a_separate_criterion(phase):
    """LPTLoss is not defined on evaluation batches, which have no two halves."""
    adapter, labels = build("timm ViT", phase), torch.tensor([1, 4, 0])
    adapter.criterion = LPTLoss([5, 4, 3, 2, 1], epochs=2)
    got = adapter(images(3), labels=labels)
    match = 1 - adapter(images(3), return_output=True).similarity.mean() if phase == "group" else 0
    torch.testing.assert_close(got.loss, F.cross_entropy(got.logits, labels) + match)
    adapter.eval_criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    got = adapter(images(3), labels=labels)
    torch.testing.assert_close(got.loss, F.cross_entropy(got.logits, labels, label_smoothing=0.1))
    with pytest.raises(InputError, match="3 rows cannot be split into two equal halves"):
        adapter.train()(images(3), labels=labels)


def test_contradictory_calls_are_refused():
    adapter = build("timm ViT")
    with pytest.raises(InputError, match="same argument"):
        adapter(images(), pixel_values=images())
    with pytest.raises(InputError, match="leave labels= out"):
        adapter(images(), labels=torch.tensor([0, 1]), return_output=True)


def test_message_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.modeling_outputs", None)
    with pytest.raises(StateError, match=r"lpt_peft\[transformers\].*adapter\(images\)"):
        build("timm ViT")(pixel_values=images())


def test_disabled_the_plain_model_computes_its_own_loss():
    adapter = wrap(num_classes=5)
    batch, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    with adapter.disable_adapter():
        got = adapter(pixel_values=batch, labels=labels)
    expected = adapter.vit(pixel_values=batch, labels=labels)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


def test_signature_names_what_trainer_looks_for():
    assert {"pixel_values", "labels"} <= set(inspect.signature(LongTailPromptAdapter.forward).parameters)


# The config


def test_config_is_that_of_the_model_if_classes_agree():
    adapter = wrap()
    assert adapter.config is adapter.vit.config
    assert adapter.metadata.label_names == tuple(NAMES)


def test_config_names_the_classes_of_the_head():
    adapter = wrap(num_classes=5)
    assert adapter.metadata.label_names is None
    assert adapter.config.num_labels == 5
    assert adapter.config.id2label[4] == "LABEL_4"
    assert adapter.vit.config.num_labels == 3, "the model's own is untouched"
    assert adapter.config is adapter.config
    adapter.config.use_cache = False
    assert adapter.config.use_cache is False
    adapter.metadata = type(adapter.metadata)(label_names=tuple("abcde"))
    assert adapter.config.id2label == dict(enumerate("abcde"))
    assert adapter.config.label2id["e"] == 4


def test_label_names_reach_the_prompt_file(tmp_path):
    wrap("group").save_pretrained(tmp_path)
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, vit())
    assert loaded.metadata.label_names == tuple(NAMES)
    bare = vit(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    assert LongTailPromptAdapter.from_pretrained(tmp_path, bare).config.id2label == dict(enumerate(NAMES))


# Trainer


@phases
def test_trainer_trains_and_evaluates(tmp_path, phase):
    adapter = wrap(phase)
    before, frozen = adapter.adapter_state_dict(), {n: p.clone() for n, p in adapter.vit.named_parameters()}
    run = trainer(adapter, tmp_path, num_train_epochs=8)
    start = run.evaluate()
    run.train()
    end = run.evaluate()
    assert end["eval_loss"] < start["eval_loss"]
    assert end["eval_accuracy"] >= 0.9
    after = adapter.adapter_state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {"shared": {"shared.prompts"}, "group": {"pool.prompts", "pool.keys"}}[phase]
    assert moved == trained | {"head.weight"}
    assert all(torch.equal(p, frozen[n]) for n, p in adapter.vit.named_parameters())
    predicted = run.predict(Rows(12))
    with torch.no_grad():
        batch = torch.stack(Rows(12).images)
        np.testing.assert_allclose(predicted.predictions, adapter.eval()(batch).numpy(), rtol=1e-4, atol=1e-4)


@phases
def test_trainer_resumes_and_loads_the_best_checkpoint(tmp_path, phase):
    """Checkpoints contain prompts only, and an interrupted run ends like a run without interruption."""
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}

    def adapter():
        made = wrap(phase)
        made.backbone_in_state_dict = False
        return made

    whole = adapter()
    run = trainer(whole, tmp_path / "whole", **options)
    run.train()
    checkpoints = sorted(Path(tmp_path / "whole").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for path in checkpoints:
        assert set(safetensors.torch.load_file(path / "model.safetensors")) == OWN
    resumed = wrap({"shared": "group", "group": "shared"}[phase])  # the checkpoint sets the phase
    resumed.backbone_in_state_dict = False
    resumed.phase = phase
    trainer(resumed, tmp_path / "whole", **options).train(resume_from_checkpoint=str(checkpoints[1]))
    for name, tensor in resumed.adapter_state_dict().items():
        torch.testing.assert_close(tensor, whole.adapter_state_dict()[name])
    best = safetensors.torch.load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(whole.head.weight, best["head.weight"])
    loaded = adapter()
    loaded.load_state_dict(best)
    assert loaded.phase == phase


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory):
    """Results of Trainer without options, by phase."""
    found = {}
    for phase in ("shared", "group"):
        adapter = wrap(phase)
        trainer(adapter, tmp_path_factory.mktemp("plain"), max_steps=2, optim="sgd").train()
        found[phase] = adapter.adapter_state_dict()
    return found


def named(options):
    return "-".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else None


@phases
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"auto_find_batch_size": True}, 0),
        ({"bf16": True}, 5e-3),
        ({"fp16": True}, 5e-4),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-6, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-6, marks=pytest.mark.slow),
    ],
    ids=named,
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trainer_options_that_keep_the_result(tmp_path, phase, options, tolerance, after_two_steps):
    adapter = wrap(phase)
    torch._dynamo.reset()
    run = trainer(adapter, tmp_path, max_steps=2, optim="sgd", **options)
    run.train()
    for name, tensor in adapter.adapter_state_dict().items():
        assert tensor.dtype == (torch.int64 if name == "block_k_query" else torch.float32)
        torch.testing.assert_close(tensor, after_two_steps[phase][name], rtol=0, atol=tolerance, msg=name)
    assert np.isfinite(run.evaluate()["eval_loss"])


@phases
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.5},
        {"gradient_accumulation_steps": 2},
        {"optim": "adamw_torch"},
        {"weight_decay": 0.9},
        {"max_grad_norm": 0.01},
    ],
    ids=named,
)
def test_trainer_options_that_change_the_result(tmp_path, phase, options, after_two_steps):
    adapter = wrap(phase)
    run = trainer(adapter, tmp_path, max_steps=2, **{"optim": "sgd", **options})
    run.train()
    before = wrap(phase).head.weight
    assert not torch.equal(adapter.head.weight, before)
    assert not torch.equal(adapter.head.weight, after_two_steps[phase]["head.weight"])
    assert np.isfinite(run.evaluate()["eval_loss"])


@phases
def test_trainer_evaluates_in_bfloat16(tmp_path, phase):
    adapter = wrap(phase)
    expected = trainer(adapter, tmp_path).evaluate()["eval_loss"]
    got = trainer(adapter, tmp_path, bf16_full_eval=True).evaluate()["eval_loss"]
    assert got == pytest.approx(expected, rel=0.05)
    assert got != expected


def test_trainer_checkpoints_blocks(tmp_path):
    adapter = wrap()
    calls = []
    for block in adapter.backbone.blocks:
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer(adapter, tmp_path, max_steps=1).train()
    plain = len(calls)
    calls.clear()
    trainer(adapter, tmp_path, max_steps=1, gradient_checkpointing=True).train()
    assert len(calls) > plain


def test_trainer_with_lpt_loss(tmp_path):
    adapter = wrap("group")
    adapter.criterion = LPTLoss([8, 8, 8], epochs=3)
    keys = adapter.pool.keys.detach().clone()
    run = trainer(adapter, tmp_path, eval_strategy="epoch", per_device_eval_batch_size=5)
    run.train()
    assert not torch.equal(adapter.pool.keys, keys)


def test_trainer_with_a_vit_of_timm(tmp_path):
    adapter = LongTailPromptAdapter.wrap(make("timm ViT"), 3)
    data = torch.nn.functional.interpolate(torch.stack(Rows(8).images), size=32)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(data, Rows(8).labels, strict=True)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    run = Trainer(model=adapter, args=arguments, train_dataset=rows, eval_dataset=rows)
    run.train()
    assert np.isfinite(run.evaluate()["eval_loss"])


@phases
def test_get_peft_model_on_an_adapter_in_the_trainer(tmp_path, phase):
    """PEFT freezes all but LoRA; after the phase is assigned again, the Trainer trains both."""
    peft = pytest.importorskip("peft")
    adapter = wrap(phase)
    model = peft.get_peft_model(adapter, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    adapter.phase = phase
    head = adapter.head.weight.detach().clone()
    trainer(model, tmp_path, max_steps=2, label_names=["labels"]).train()
    assert not torch.equal(adapter.head.weight, head)
    assert any(p.detach().any() for name, p in adapter.named_parameters() if "lora_B" in name)


# pipeline


@phases
def test_pipeline_of_a_prompt_file(tmp_path, phase):
    """Saved, and loaded on another copy of the ViT, in batches."""
    wrap(phase).save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]
    expected = pipeline("image-classification", model=wrap(phase).eval(), image_processor=processor)(pictures, top_k=2)
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, vit()).eval()
    got = pipeline("image-classification", model=loaded, image_processor=processor, batch_size=2)(pictures, top_k=2)
    assert [[answer["label"] for answer in answers] for answers in got] == [
        [answer["label"] for answer in answers] for answers in expected
    ]
    assert [len(answers) for answers in got] == [2, 2, 2]
    for pair in zip(got, expected, strict=True):
        np.testing.assert_allclose(*([answer["score"] for answer in answers] for answers in pair), rtol=1e-5)


@phases
def test_pipeline_uses_prompts_and_class_names(phase):
    adapter = wrap(phase).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=adapter, image_processor=processor)(picture)
    batch = processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = adapter(batch).softmax(1)[0]
    got = {answer["label"]: answer["score"] for answer in answers}
    assert set(got) == set(NAMES)
    for index, name in enumerate(NAMES):
        assert got[name] == pytest.approx(float(expected[index]), abs=1e-6)
    plain = {
        a["label"]: a["score"]
        for a in pipeline("image-classification", model=adapter.vit, image_processor=processor)(picture)
    }
    assert got != pytest.approx(plain, abs=1e-3)
