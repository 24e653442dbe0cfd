"""The Trainer of transformers with LPT dropped in; the lines marked LPT are all that is ours.

pip install -e ".[demo,transformers]"
python examples/hf_trainer.py

The ViT may be one of timm, as here, or of transformers. Trainer's own checkpoints would hold the whole ViT: save the
prompts instead, as the last line does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lpt_peft import AdapterOutput, DualSampler, LongTailPromptAdapter, LPTLoss


class Model(nn.Module):
    """The adapter as Trainer wants a model: without a `config` that it would write into."""

    def __init__(self, adapter: LongTailPromptAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, images: Tensor) -> AdapterOutput:
        """All that the loss reads."""
        return self.adapter(images, return_output=True)


class LPTTrainer(Trainer):
    """Trainer with its own batches and its own loss."""

    def __init__(self, *args: Any, sampler: DualSampler, criterion: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampler, self.criterion = sampler, criterion.to(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by Accelerate: the sampler shares out among processes by itself."""
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=_collate)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The whole objective, on the two halves of a batch."""
        return self.criterion(model(inputs["images"]), inputs["labels"], int(self.state.epoch or 0))


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch it is."""

    def __init__(self, sampler: DualSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.sampler.set_epoch(round(state.epoch or 0))


def _collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.as_tensor(labels)}


def train(
    vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05, **options: Any
) -> nn.Module:
    """Two phases of LPT on any map-style dataset of (image, label); `options` are TrainingArguments'."""
    class_counts = torch.bincount(torch.tensor(labels))
    model = LongTailPromptAdapter.wrap(vit, len(class_counts))  # LPT
    sampler = DualSampler(labels, batch_size=64)  # LPT
    arguments = TrainingArguments(num_train_epochs=epochs, save_strategy="no", report_to="none", **options)
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sampler))
        LPTTrainer(
            Model(model),
            arguments,
            train_dataset=dataset,
            optimizers=(optimizer, schedule),
            callbacks=[SetEpoch(sampler)],
            sampler=sampler,
            criterion=LPTLoss(class_counts, epochs),  # LPT
        ).train()
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    digits = DigitsLT("train", augment=True)
    train(glyph_vit(), digits, digits.labels).save_pretrained("digits-prompts")
