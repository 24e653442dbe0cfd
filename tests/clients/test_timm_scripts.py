"""The calls of timm's train.py, validate.py and inference.py on a wrapped model.

The scripts are not part of the timm package; their tasks, loaders, optimizers, averages and checkpoints are.
"""

from __future__ import annotations

import warnings
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import _registry, create_model, load_checkpoint, register_model, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad
from torch import nn

from lpt_peft import LongTailPromptAdapter

CLASSES = 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
phases = pytest.mark.parametrize("phase", ["shared", "group"])


def tiny(seed=7):
    """A ViT of timm for 32 px with its own data configuration; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": MEAN, "std": STD}
    return vit


def lpt_test_vit(pretrained=False, phase="shared", start=None, **kwargs):
    """The only change for timm's scripts, together with @register_model: an entrypoint for --model lpt_test_vit."""
    adapter = LongTailPromptAdapter.wrap(tiny(), prompt_length=2, pool_size=4)
    if start is not None:
        load_checkpoint(adapter, start)
    adapter.phase = phase
    return adapter


def plain_test_vit(pretrained=False, **kwargs):
    """A teacher for --kd-model-name."""
    return tiny(seed=8)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Registers both entrypoints for the tests of this file only, because other tests list timm's models."""
    for entrypoint in (lpt_test_vit, plain_test_vit):
        register_model(entrypoint)
    yield
    for entrypoint in (lpt_test_vit, plain_test_vit):
        _registry._clear_model_entries(entrypoint.__name__)
        del _registry._model_entrypoints[entrypoint.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of three classes that differ in color."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for label, mean in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(mean, 40, (36, 36, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(place / f"{split}{label}{index}.png")
    return root


def loader(model, folder, split="train", collate_fn=None):
    config = resolve_data_config({}, model=model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 32, 32), MEAN, STD)
    dataset = create_dataset("", root=str(folder), split=split, is_training=split == "train")
    return create_loader(
        dataset,
        batch_size=8,
        is_training=split == "train",
        use_prefetcher=collate_fn is not None,
        num_workers=0,
        device=torch.device("cpu"),
        collate_fn=collate_fn,
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        **({} if split == "train" else {"crop_pct": config["crop_pct"]}),
    )


def train(task, batches, epochs=2, saver=None, start=0, optimizer=None, mixup=None):
    """Loop of train.py: the task computes the loss, timm's tools do the rest."""
    model = task.get_trainable_module()
    optimizer = optimizer or create_optimizer_v2(model, opt="adamw", lr=0.02, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)
    if start:
        schedule.step(start)
    losses, updates = [], 0
    for epoch in range(start, epochs):
        task.train()
        for images, target in batches:
            loss = task(*(mixup(images, target) if mixup else (images, target)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(task.get_clip_parameters(), value=1.0)
            optimizer.step()
            updates += 1
            task.update_ema(step=updates)
            losses.append(float(loss.detach()))
        schedule.step(epoch + 1)
        if saver is not None:
            saver.save_checkpoint(epoch, metric=-losses[-1])
    return losses


@torch.no_grad()
def validate(model, batches):
    """Loop of validate.py."""
    model.eval()
    logits, targets = zip(*[(model(images), target) for images, target in batches], strict=True)
    top1, _ = accuracy(torch.cat(logits), torch.cat(targets), topk=(1, CLASSES))
    return float(top1), torch.cat(logits)


def task_of(model, **options):
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False, **options)


def saver_for(task, optimizer, place, model_name="lpt_test_vit"):
    args = Namespace(model=model_name)
    options = {"optimizer": optimizer, "checkpoint_dir": str(place), "recovery_dir": str(place), "args": args}
    return CheckpointSaver(task.get_trainable_module(), task=task, **options)


# Training


@phases
def test_train_with_checkpointing_and_head_init_scale(folder, phase):
    """--grad-checkpointing --head-init-scale 0.5; the frozen tensors do not move, and only the head warns."""
    torch.manual_seed(0)
    model = create_model("lpt_test_vit", phase=phase)
    assert (model.num_classes, model.in_chans, model.head_hidden_size) == (CLASSES, 3, 24)
    batch = torch.randn(2, 3, 32, 32)
    before = model.eval()(batch)
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.5)
        with pytest.warns(UserWarning, match=r"no bias.*directions.*--head-init-scale"):
            model.get_classifier().bias.mul_(0.5)
    torch.testing.assert_close(model(batch), before)
    model.set_grad_checkpointing(enable=True)
    frozen = {name: value.clone() for name, value in model.vit.state_dict().items()}
    calls = []
    model.vit.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(task_of(model), loader(model, folder), epochs=4)
    assert len(calls) == 2 * len(losses), "each step computes the checkpointed block once more"
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.vit.state_dict().items())
    assert validate(model, loader(model, folder, "val"))[0] > 100 / CLASSES


def test_head_init_bias_changes_nothing():
    head = create_model("lpt_test_vit").get_classifier()
    with pytest.warns(UserWarning, match="no bias"):
        assert head.bias.shape == (0,)
    with pytest.warns(UserWarning, match="no bias"):
        nn.init.constant_(head.bias, 0.3)
    assert dict(head.named_parameters()).keys() == {"weight"}


@phases
@pytest.mark.parametrize("collate", [False, True])
def test_mixup_and_cutmix(folder, phase, collate):
    """--mixup --cutmix --smoothing, by Mixup as well as by the collate function of the prefetching loader."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = create_model("lpt_test_vit", phase=phase)
    options = {"mixup_alpha": 0.4, "cutmix_alpha": 0.6, "label_smoothing": 0.1, "num_classes": CLASSES}
    collate_fn, mixup = (FastCollateMixup(**options), None) if collate else (None, Mixup(**options))
    task = ClassificationTask(model, SoftTargetCrossEntropy(), verbose=False)
    before = {name: value.clone() for name, value in model.adapter_state_dict().items()}
    losses = train(task, loader(model, folder, collate_fn=collate_fn), mixup=mixup)
    assert np.isfinite(losses).all()
    moved = {name for name, value in model.adapter_state_dict().items() if not torch.equal(value, before[name])}
    # The loss does not depend on the keys, so they only decay; LPTLoss or labels= train them.
    expected = {"shared": {"shared.prompts", "head.weight"}, "group": {"pool.prompts", "pool.keys", "head.weight"}}
    assert moved == expected[phase]


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("task_loss_weight", [None, 0.3])
def test_logit_distillation(folder, phase, task_loss_weight):
    """--kd-model-name: the teacher is built by name, with the classes and channels of the adapter."""
    torch.manual_seed(0)
    student = create_model("lpt_test_vit", phase=phase)
    task = LogitDistillationTask(
        student,
        "plain_test_vit",
        LabelSmoothingCrossEntropy(0.1),
        task_loss_weight=task_loss_weight,
        temperature=2.0,
        verbose=False,
    )
    torch.testing.assert_close(task.student_mean.flatten(), torch.tensor(MEAN))
    teacher = {name: value.clone() for name, value in task.teacher.model.state_dict().items()}
    losses = train(task, loader(student, folder), epochs=4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, teacher[name]) for name, value in task.teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.vit.parameters())


def test_adapter_as_teacher(folder):
    torch.manual_seed(0)
    teacher = create_model("lpt_test_vit", phase="group")
    student = tiny(seed=3)
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)
    images, _ = next(iter(loader(teacher, folder)))
    assert torch.equal(task.teacher(images), teacher(images))
    before = {name: value.clone() for name, value in teacher.adapter_state_dict().items()}
    train(task, loader(student, folder))
    assert all(torch.equal(value, before[name]) for name, value in teacher.adapter_state_dict().items())


def test_distillation_of_features_and_tokens_is_refused_with_a_reason(folder):
    """They call forward_features or a distilled head, which would ignore the prompts."""
    student = create_model("lpt_test_vit")
    task = FeatureDistillationTask(student, tiny(), nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(AttributeError, match=r"no forward_features: it would compute without prompts"):
        task(*next(iter(loader(student, folder))))
    with pytest.raises(ValueError, match="set_distilled_training"):
        TokenDistillationTask(student, tiny(), nn.CrossEntropyLoss(), verbose=False)


@phases
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torchcompile(folder, phase, backend):
    """--torchcompile, with and without an average: the same losses and logits as without."""
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = create_model("lpt_test_vit", phase=phase)
        task = task_of(model)
        task.setup_ema(decay=0.5)
        if compiled:
            task.compile(backend=backend)
            task.compile_ema(backend=backend)
        images = list(loader(model, folder, "val"))
        losses = train(task, images)
        outcomes.append(
            (torch.tensor(losses), *(validate(task.get_eval_model(ema=e), images)[1] for e in (False, True)))
        )
    for plain, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-4)


@phases
def test_layer_decay_reaches_prompts_and_head(phase):
    """--layer-decay: for timm, the parameters before the head are one layer, and the head another."""
    model = create_model("lpt_test_vit", phase=phase)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale.keys() == {id(p) for p in model.trainable_parameters()}
    assert scale[id(model.head.weight)] == 1.0


# Averages and checkpoints


@phases
def test_average_checkpoint_resume_validate(folder, tmp_path, phase):
    """--model-ema, CheckpointSaver, validate.py with and without --use-ema, and --resume with the same result."""
    torch.manual_seed(0)
    straight = create_model("lpt_test_vit", phase=phase)
    batches = list(loader(straight, folder))
    held_out = list(loader(straight, folder, "val"))
    task = task_of(straight)
    optimizer = create_optimizer_v2(straight, opt="adamw", lr=0.02)
    task.setup_ema(decay=0.5)
    straight.head_drop.p = 0.0
    place = tmp_path / "run"
    place.mkdir()
    saver = saver_for(task, optimizer, place)
    train(task, batches, epochs=2, saver=saver, optimizer=optimizer)
    average = task.get_eval_model(ema=True)
    expected = {False: validate(straight, held_out)[1], True: validate(average, held_out)[1]}
    assert not torch.allclose(expected[False], expected[True], atol=1e-3)
    with torch.no_grad():
        logits = straight.head(straight.features(torch.cat([images for images, _ in held_out])))
    torch.testing.assert_close(expected[False], logits)

    for use_ema in (False, True):  # validate.py: a new model, in phase "shared", takes the phase of the checkpoint
        model = create_model("lpt_test_vit")
        load_checkpoint(model, str(place / "last.pth.tar"), use_ema=use_ema)
        assert model.phase == phase
        torch.testing.assert_close(validate(model, held_out)[1], expected[use_ema])
    wrapped = create_model("lpt_test_vit", checkpoint_path=str(place / "last.pth.tar"))  # as in inference.py
    torch.testing.assert_close(validate(wrapped, held_out)[1], expected[True])

    first = place / "checkpoint-0.pth.tar"
    resumed = create_model("lpt_test_vit", phase=phase)
    resumed.head_drop.p = 0.0
    optimizer = create_optimizer_v2(resumed, opt="adamw", lr=0.02)
    assert resume_checkpoint(resumed, str(first), optimizer, log_info=False) == 1
    train(task_of(resumed), batches, epochs=2, start=1, optimizer=optimizer)
    assert resumed.phase == phase
    end = resumed.adapter_state_dict()
    assert all(torch.equal(value, end[name]) for name, value in straight.adapter_state_dict().items())


def test_resume_in_the_wrong_phase_does_not_load_the_optimizer(folder, tmp_path):
    """The state of an optimizer for phase "group" does not fit an optimizer for phase "shared"."""
    task = task_of(create_model("lpt_test_vit", phase="group"))
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=0.02)
    saver = saver_for(task, optimizer, tmp_path)
    train(task, list(loader(task.get_trainable_module(), folder)), epochs=1, saver=saver, optimizer=optimizer)
    fresh = create_model("lpt_test_vit")
    with pytest.raises(ValueError, match="parameter group"):
        resume_checkpoint(
            fresh, str(tmp_path / "last.pth.tar"), create_optimizer_v2(fresh, opt="adamw"), log_info=False
        )


def test_second_phase_starts_from_the_checkpoint_of_the_first(folder, tmp_path):
    """By an argument of the entrypoint, as in docs/how-to/timm.md; --initial-checkpoint sets the phase of its file."""
    torch.manual_seed(0)
    first = task_of(create_model("lpt_test_vit"))
    model = first.get_trainable_module()
    saver = saver_for(first, create_optimizer_v2(model, opt="adamw"), tmp_path)
    train(first, list(loader(model, folder)), epochs=1, saver=saver)
    file = str(tmp_path / "last.pth.tar")
    assert create_model("lpt_test_vit", phase="group", checkpoint_path=file).phase == "shared"
    second = create_model("lpt_test_vit", phase="group", start=file)
    assert second.phase == "group"
    assert torch.equal(second.shared.prompts, model.shared.prompts)
    train(task_of(second), list(loader(second, folder)), epochs=1)
    assert torch.equal(second.shared.prompts, model.shared.prompts)
    assert not torch.equal(second.pool.prompts, model.pool.prompts)


@phases
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"exclude_buffers": True}, {"dtype": torch.float64}])
def test_moving_average_across_phases(phase, options):
    """An average that was created in phase "shared" follows the adapter into phase "group"."""
    model = create_model("lpt_test_vit", phase="shared").eval()
    average = ModelEmaV3(model, decay=0.0, **options)
    model.phase = phase
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    average.update(model)
    images = torch.randn(2, 3, 32, 32)
    assert average.module.phase == phase
    if "dtype" in options:
        images, model = images.double(), model.double()
    torch.testing.assert_close(average(images), model(images))


@phases
def test_precision_flags(folder, phase):
    """--amp --amp-dtype bfloat16 and --model-dtype bfloat16."""
    model = create_model("lpt_test_vit", phase=phase)
    images, target = next(iter(loader(model, folder)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = task_of(model)(images, target)["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.trainable_parameters())
    half = create_model("lpt_test_vit", phase=phase).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    task_of(half)(images.bfloat16(), target)["loss"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.trainable_parameters())
