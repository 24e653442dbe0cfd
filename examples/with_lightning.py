"""A Lightning module with LPT; the lines marked LPT are the changes.

pip install -e ".[examples]"
python examples/with_lightning.py

The file is not called lightning.py, because that would hide the library from the scripts in this folder.
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

    def __init__(self, adapter: LongTailPromptAdapter, criterion: LPTLoss, sampler: DualSampler, lr: float) -> None:
        super().__init__()
        self.adapter, self.criterion, self.sampler, self.lr = adapter, criterion, sampler, lr

    def on_train_epoch_start(self) -> None:
        """Set the epoch; when a run resumes within an epoch, the sampler's state sets it instead."""
        self.sampler.set_epoch(self.current_epoch)  # LPT

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of both halves of a batch."""
        images, target = batch
        loss = self.criterion(self.adapter(images, return_output=True), target, self.current_epoch)  # LPT
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the position of the next batch, so that a run can resume within an epoch."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, position = divmod(done, len(self.sampler))
        checkpoint["sampler"] = {**self.sampler.state_dict(), "epoch": epoch, "position": position}  # LPT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Start at the batch after the checkpoint."""
        self.sampler.load_state_dict(checkpoint["sampler"])  # LPT

    def configure_optimizers(self) -> dict[str, Any]:
        """Return SGD on the parameters that the phase trains."""
        parameters = self.adapter.trainable_parameters()  # LPT
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05, **options: Any
) -> nn.Module:
    """Train both phases of LPT on a map-style dataset of (image, label); `options` go to the Trainer."""
    class_counts = torch.bincount(torch.tensor(labels))
    model = LongTailPromptAdapter.wrap(vit, len(class_counts))  # LPT
    model.backbone_in_state_dict = False  # LPT; checkpoints hold prompts only
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT
        sampler = DualSampler(labels, batch_size=64)  # LPT; each rank draws its share
        module = Module(model.train(), LPTLoss(class_counts, epochs), sampler, lr)  # LPT
        trainer = lightning.Trainer(max_epochs=epochs, use_distributed_sampler=False, **options)
        trainer.fit(module, DataLoader(dataset, batch_sampler=sampler))
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    digits = DigitsLT("train", augment=True)
    model = train(glyph_vit(), digits, digits.labels, logger=False, enable_checkpointing=False)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    model.save_pretrained("digits-prompts", is_main_process=main)
