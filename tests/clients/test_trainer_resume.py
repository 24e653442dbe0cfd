"""transformers' Trainer with LPT's sampler and loss, as in examples/hf_trainer.py, interrupted and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader, TensorDataset

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss
from tests.conftest import tiny_vit

transformers = pytest.importorskip("transformers")
from tests.clients.example_processes import load_example  # noqa: E402

LABELS = [0] * 30 + [1] * 10 + [2] * 4
EPOCHS = 3


def train(folder, phase, resume=None, **options):
    """Train a phase, and return the adapter, the images of every batch, and the Trainer."""
    example = load_example("hf_trainer")
    images = torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4)
        adapter.backbone_in_state_dict = False
        adapter.phase = phase
        adapter.criterion = LPTLoss(torch.bincount(torch.tensor(LABELS)), EPOCHS)
        sampler = DualSampler(LABELS, 16)
        seen = []

        def collate(rows):
            batch = example.collate(rows)
            seen.append(batch["pixel_values"][:, 0, 0, 0].tolist())
            return batch

        data = TensorDataset(images, torch.tensor(LABELS))
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
        settings = {"save_strategy": "steps", "save_steps": 4, "report_to": "none", "use_cpu": True, "seed": 5}
        arguments = transformers.TrainingArguments(
            str(folder), num_train_epochs=EPOCHS, learning_rate=0.02, disable_tqdm=True, **{**settings, **options}
        )
        callbacks = [example.SetEpoch(sampler, adapter.criterion)]
        trainer = transformers.Trainer(adapter, arguments, train_dataset=data, callbacks=callbacks)
        trainer.get_train_dataloader = lambda: loader
        trainer.train(resume_from_checkpoint=resume)
    return adapter, seen, trainer


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_resume_in_an_epoch_is_exact(tmp_path, phase):
    """With dropout and the noise of the loss: Trainer restores the random state, the sampler the order of images."""
    whole, seen, trainer = train(tmp_path, phase)
    steps = len(DualSampler(LABELS, 16)) * EPOCHS
    assert trainer.state.global_step == steps == 18
    for step in (4, 8, 12, 16):  # in each epoch, and at its end
        checkpoint = tmp_path / f"checkpoint-{step}"
        names = set(safetensors.torch.load_file(checkpoint / "model.safetensors"))
        assert not any(name.startswith("vit.") for name in names)
        resumed, again, _ = train(tmp_path / "resumed", phase, str(checkpoint))
        assert again[-(steps - step) :] == seen[step:]
        for name, tensor in resumed.adapter_state_dict().items():
            assert torch.equal(tensor, whole.adapter_state_dict()[name]), (step, name)


def test_checkpoints_resume_in_their_phase(tmp_path):
    whole, _, _ = train(tmp_path, "group")
    folder = sorted(Path(tmp_path).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1]
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4)
    adapter.backbone_in_state_dict = False
    adapter.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=True)
    assert adapter.phase == "group"
    batch = torch.randn(2, 3, 32, 32)
    assert torch.equal(adapter.eval()(batch), whole.eval()(batch))
