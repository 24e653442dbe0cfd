"""Training with the transformers Trainer and LPT; the lines marked LPT are the changes.

pip install -e ".[demo,transformers]"
python examples/hf_trainer.py                               # or: torchrun --nproc-per-node 2 examples/hf_trainer.py

The ViT may come from timm, as here, or from transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss


class SetEpoch(TrainerCallback):
    """Calls set_epoch at the start of each epoch, also after resuming in the middle of an epoch."""

    def __init__(self, *targets: Any) -> None:
        self.targets = targets

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        for target in self.targets:
            target.set_epoch(int(state.epoch))


def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.as_tensor(labels)}


def train(
    vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05, **options: Any
) -> nn.Module:
    """Train both phases of LPT on a map-style dataset of (image, label); `options` go to TrainingArguments."""
    class_counts = torch.bincount(torch.tensor(labels))
    model = LongTailPromptAdapter.wrap(vit, len(class_counts))  # LPT
    model.backbone_in_state_dict = False  # LPT; checkpoints hold prompts only
    sampler = DualSampler(labels, batch_size=64)  # LPT; each rank draws its share
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    arguments = TrainingArguments(num_train_epochs=epochs, save_strategy="no", report_to="none", **options)
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT
        model.criterion = LPTLoss(class_counts, epochs)  # LPT
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sampler))
        callbacks = [SetEpoch(sampler, model.criterion)]  # LPT
        trainer = Trainer(
            model, arguments, train_dataset=dataset, optimizers=(optimizer, schedule), callbacks=callbacks
        )
        trainer.get_train_dataloader = lambda: loader  # LPT; Trainer has no argument for a batch sampler
        trainer.train()
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    digits = DigitsLT("train", augment=True)
    model = train(glyph_vit(), digits, digits.labels)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    model.save_pretrained("digits-prompts", is_main_process=main)
