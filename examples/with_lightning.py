"""An ordinary Lightning module with LPT dropped in; the lines marked LPT are all that is ours.

pip install -e ".[demo]" lightning
python examples/with_lightning.py

(A file called lightning.py would hide the library from every script in this folder.)
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss


class Module(lightning.LightningModule):
    """One phase of training."""

    def __init__(self, adapter: nn.Module, class_counts: Tensor, epochs: int, lr: float) -> None:
        super().__init__()
        self.adapter, self.epochs, self.lr = adapter, epochs, lr
        self.criterion = LPTLoss(class_counts, epochs)  # LPT

    def on_train_epoch_start(self) -> None:
        """Another order of the images in every epoch."""
        self.trainer.train_dataloader.batch_sampler.set_epoch(self.current_epoch)  # LPT

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The whole objective, on the two halves of a batch."""
        images, target = batch
        loss = self.criterion(self.adapter(images, return_output=True), target, self.current_epoch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD over what the phase learns."""
        learnt = self.adapter.trainable_parameters()  # LPT
        optimizer = torch.optim.SGD(learnt, lr=self.lr, momentum=0.9, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05, **options: Any
) -> nn.Module:
    """Two phases of LPT on any map-style dataset of (image, label); `options` are the Trainer's."""
    class_counts = torch.bincount(torch.tensor(labels))
    model = LongTailPromptAdapter.wrap(vit, len(class_counts))  # LPT
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT
        loader = DataLoader(dataset, batch_sampler=DualSampler(labels, batch_size=64))  # LPT; made on every rank
        trainer = lightning.Trainer(max_epochs=epochs, use_distributed_sampler=False, **options)  # it shards by itself
        trainer.fit(Module(model.train(), class_counts, epochs, lr), loader)
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    digits = DigitsLT("train", augment=True)
    model = train(glyph_vit(), digits, digits.labels, logger=False, enable_checkpointing=False)
    model.save_pretrained("digits-prompts")
