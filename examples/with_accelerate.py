"""A training loop on Hugging Face Accelerate with LPT; the lines marked LPT are the changes.

pip install -e ".[demo]"
python examples/with_accelerate.py                      # or: accelerate launch examples/with_accelerate.py

The file is not called accelerate.py, because that would hide the library from the scripts in this folder. For
checkpoints, validation and exact resume use `lpt-peft train`, which is built on a loop like this.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss


def train(vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05) -> nn.Module:
    """Train both phases of LPT on a map-style dataset of (image, label), on any number of processes."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    class_counts = torch.bincount(torch.tensor(labels))
    model = LongTailPromptAdapter.wrap(vit, len(class_counts))  # LPT
    sampler = DualSampler(labels, batch_size=64)  # LPT; each rank draws its share, so the loader is not prepared
    loader = DataLoader(dataset, batch_sampler=sampler)
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT
        criterion = LPTLoss(class_counts, epochs).to(accelerator.device)  # LPT
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
        prepared, optimizer = accelerator.prepare(model, optimizer)
        prepared.train()
        for epoch in range(epochs):
            sampler.set_epoch(epoch)  # LPT
            criterion.set_epoch(epoch)  # LPT
            for images, target in loader:
                output = prepared(images.to(accelerator.device), return_output=True)
                loss = criterion(output, target.to(accelerator.device))
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
            accelerator.print(f"phase {phase}, epoch {epoch}: loss {loss.item():.3f}")
        model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    digits = DigitsLT("train", augment=True)
    model = train(glyph_vit(), digits, digits.labels)
    model.save_pretrained("digits-prompts", is_main_process=PartialState().is_main_process)
