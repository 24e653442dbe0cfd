"""Accelerate's loaders and states, and Lightning's sampler replacement, on two processes; see test_accelerate.py.

`torchrun --standalone --nproc-per-node 2 -m tests.clients.two_processes FOLDER`: each rank writes FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader, TensorDataset

from lpt_peft import DualSampler, LongTailPromptAdapter
from tests.conftest import tiny_vit

LABELS = [0] * 30 + [1] * 12 + [2] * 6
HALF = 4


def build(phase: str, seed: int = 0) -> LongTailPromptAdapter:
    torch.manual_seed(seed)
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4)
    adapter.backbone_in_state_dict = False
    adapter.phase = phase
    return adapter


def loader(**replica: int) -> DataLoader[Any]:
    """Batches are lists of image numbers. The loader has a generator, because iter() would draw from torch's."""
    data, sampler = TensorDataset(torch.arange(len(LABELS))), DualSampler(LABELS, 2 * HALF, **replica)
    return DataLoader(data, batch_sampler=sampler, generator=torch.Generator())


def numbers(batches: DataLoader[Any]) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def accelerate(accelerator: Accelerator, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"unprepared": numbers(loader()), "prepared": numbers(accelerator.prepare(loader()))}
    dealt = accelerator.prepare(loader(num_replicas=1, rank=0))
    found["dealt"] = numbers(dealt)
    found["dealt, resumed"] = numbers(skip_first_batches(dealt, 2))
    for phase, other in (("shared", "group"), ("group", "shared")):
        saved = accelerator.prepare(build(phase, 1))
        accelerator.save_state(f"{folder}/{phase}")
        accelerator.free_memory()
        loaded = accelerator.prepare(build(other, 2))
        accelerator.load_state(f"{folder}/{phase}")
        adapters = [accelerator.unwrap_model(model).eval() for model in (saved, loaded)]
        images = torch.randn(2, 3, 32, 32)
        found[f"phase {phase}"] = adapters[1].phase
        found[f"logits {phase}"] = torch.equal(*(adapter(images) for adapter in adapters))
        accelerator.free_memory()
    return found


def lightning_refusal(folder: str) -> str:
    """Message of Lightning if it may replace the sampler, which is the default."""
    import lightning  # noqa: PLC0415

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = build("shared")

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            raise AssertionError("trained on batches of an unknown sampler")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.adapter.trainable_parameters(), lr=0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, default_root_dir=folder, enable_checkpointing=False, **quiet
    )
    try:
        trainer.fit(Module(), loader())
    except TypeError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = accelerate(Accelerator(cpu=True), sys.argv[1])
    results["lightning"] = lightning_refusal(sys.argv[1])
    torch.save(results, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
