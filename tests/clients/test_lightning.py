"""Lightning's Trainer with an adapter in its module, as in examples/with_lightning.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss, ShotMetrics
from tests.conftest import tiny_vit

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402

from tests.clients.example_processes import load_example  # noqa: E402

LABELS = [0] * 30 + [1] * 10 + [2] * 4
COUNTS = [30, 10, 4]
EPOCHS = 3
OWN = {"shared.prompts", "pool.prompts", "pool.keys", "pool.usage", "head.weight", "phase_index", "block_k_query"}
phases = pytest.mark.parametrize("phase", ["shared", "group"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def images():
    return torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(phase, prompts_only=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4, head_dropout=0.0)
    adapter.backbone_in_state_dict = not prompts_only
    adapter.phase = phase
    return adapter.train()


def module(adapter, kind="Module", **options):
    sampler = DualSampler(LABELS, 16)
    criterion = LPTLoss(COUNTS, EPOCHS, noise_scale=0.0)  # a function of the images: Lightning restores no random state
    return getattr(load_example("with_lightning"), kind)(adapter, criterion, sampler, 0.02, **options)


class Seen(lightning.Callback):
    """Records the images of every batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch[0][:, 0, 0, 0].tolist())


def fit(model, folder, resume=None, workers=0, **options):
    """Train, and return the images of every batch and the trainer."""
    seen = Seen()
    options["callbacks"] = [*options.get("callbacks", ()), seen]
    data = TensorDataset(images(), torch.tensor(LABELS))
    loader = DataLoader(data, batch_sampler=model.sampler, num_workers=workers)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_epochs": EPOCHS, "use_distributed_sampler": False}
    trainer = lightning.Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **options})
    trainer.fit(model, loader, ckpt_path=resume, weights_only=False)
    return seen.batches, trainer


def checkpoints(folder, every=4):
    return {
        "callbacks": [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)],
        "enable_checkpointing": True,
    }


@pytest.mark.parametrize(("phase", "workers"), [("shared", 0), ("group", 0), ("group", 2)])
def test_resume_in_an_epoch_is_exact(tmp_path, phase, workers):
    """The checkpoint needs only the sampler's state."""
    whole = module(build(phase))
    seen, trainer = fit(whole, tmp_path, **checkpoints(tmp_path, 2))
    assert trainer.global_step == len(seen) == 18
    for step in (4, 6, 8, 16) if workers == 0 else (8, 12):  # in each epoch, and at the ends
        resumed = module(build(phase))
        again, trainer = fit(resumed, tmp_path, tmp_path / f"step={step}.ckpt", workers)
        assert again == seen[step:], step
        assert trainer.global_step == 18
        for name, tensor in resumed.adapter.adapter_state_dict().items():
            assert torch.equal(tensor, whole.adapter.adapter_state_dict()[name]), (step, name)


def test_resume_from_the_checkpoint_after_an_epoch(tmp_path):
    """Lightning's default: a checkpoint at the end of each epoch."""
    whole = module(build("group"))
    callbacks = [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
    seen, _ = fit(whole, tmp_path, callbacks=callbacks, enable_checkpointing=True)
    resumed = module(build("group"))
    again, _ = fit(resumed, tmp_path, tmp_path / "epoch=1.ckpt")
    assert again == seen[12:]
    assert torch.equal(resumed.adapter.head.weight, whole.adapter.head.weight)


@phases
@pytest.mark.parametrize("prompts_only", [True, False])
def test_load_from_checkpoint_keeps_the_phase(tmp_path, phase, prompts_only):
    trained = module(build(phase, prompts_only))
    fit(trained, tmp_path, **checkpoints(tmp_path, 6))
    path = tmp_path / "step=18.ckpt"
    names = {name.removeprefix("adapter.") for name in torch.load(path, weights_only=False)["state_dict"]}
    assert names >= OWN
    assert (names == OWN) == prompts_only
    other = {"shared": "group", "group": "shared"}[phase]
    loaded = type(trained).load_from_checkpoint(
        path, adapter=build(other, prompts_only), criterion=None, sampler=trained.sampler, lr=0.1, weights_only=False
    )
    assert loaded.adapter.phase == phase
    assert torch.equal(loaded.adapter.eval()(images()), trained.adapter.eval()(images()))


@phases
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "bf16-mixed"}, 5e-3),
        ({"precision": "bf16-true"}, 2e-2),
        ({"precision": "64-true"}, 1e-5),
        ({"gradient_clip_val": 100.0}, 0),
        ({"enable_model_summary": True}, 0),
    ],
    ids=str,
)
def test_trainer_options(tmp_path, phase, options, tolerance):
    if phase == "group" and options.get("precision") in {"bf16-mixed", "bf16-true"}:
        tolerance *= 2  # another group may be selected
    plain, changed = module(build(phase)), module(build(phase))
    fit(plain, tmp_path, max_steps=2)
    fit(changed, tmp_path, max_steps=2, **options)
    for name, tensor in changed.adapter.adapter_state_dict().items():
        expected = plain.adapter.adapter_state_dict()[name]
        torch.testing.assert_close(tensor.to(expected.dtype), expected, rtol=0, atol=tolerance, msg=name)


@phases
def test_accumulation_and_weight_averaging(tmp_path, phase):
    model, before = module(build(phase)), build(phase).adapter_state_dict()
    averaging = WeightAveraging(avg_fn=lambda averaged, current, count: 0.5 * averaged + 0.5 * current)
    fit(model, tmp_path, accumulate_grad_batches=2, callbacks=[averaging], max_steps=3)
    assert model.adapter.phase == phase
    moved = {
        name for name, tensor in model.adapter.adapter_state_dict().items() if not torch.equal(tensor, before[name])
    }
    trained = {"shared": {"shared.prompts"}, "group": {"pool.prompts", "pool.keys"}}[phase]
    assert moved == trained | {"head.weight"}


@phases
def test_compile_and_grad_checkpointing(tmp_path, phase):
    plain, changed = module(build(phase)), module(build(phase))
    fit(plain, tmp_path, max_steps=2)
    changed.adapter.set_grad_checkpointing(True)
    torch._dynamo.reset()
    compiled = torch.compile(changed, backend="eager")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = TensorDataset(images(), torch.tensor(LABELS))
    trainer = lightning.Trainer(max_steps=2, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    trainer.fit(compiled, DataLoader(data, batch_sampler=changed.sampler))
    for name, tensor in changed.adapter.adapter_state_dict().items():
        torch.testing.assert_close(tensor, plain.adapter.adapter_state_dict()[name], rtol=0, atol=1e-6, msg=name)


def test_validation_with_shot_metrics(tmp_path):
    class Validated(load_example("with_lightning").Module):
        def validation_step(self, batch, index):
            self.metrics.update(self.adapter(batch[0]), batch[1])

        def on_validation_epoch_end(self):
            self.log("balanced", self.metrics.compute().overall)

    model = Validated(build("group"), LPTLoss(COUNTS, EPOCHS), DualSampler(LABELS, 16), 0.02)
    model.metrics = ShotMetrics(COUNTS, many=20, few=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    data = TensorDataset(images(), torch.tensor(LABELS))
    (found,) = trainer.validate(model, DataLoader(data, batch_size=7), verbose=False)
    with torch.no_grad():
        hits = (model.adapter.eval()(images()).argmax(1) == torch.tensor(LABELS)).float()
    expected = sum(hits[torch.tensor(LABELS) == label].mean() for label in range(3)) / 3
    assert found["balanced"] == pytest.approx(float(expected), abs=1e-6)
