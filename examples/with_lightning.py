"""An ordinary Lightning module with LPT dropped in; the lines marked LPT are all that is ours.

pip install -e ".[examples]"
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

    def __init__(self, adapter: LongTailPromptAdapter, criterion: LPTLoss, sampler: DualSampler, lr: float) -> None:
        super().__init__()
        self.adapter, self.criterion, self.sampler, self.lr = adapter, criterion, sampler, lr

    def on_train_epoch_start(self) -> None:
        """Not called when a run resumes in the middle of an epoch; the sampler's state has its epoch then."""
        self.sampler.set_epoch(self.current_epoch)  # LPT

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The whole objective, on the two halves of a batch."""
        images, target = batch
        loss = self.criterion(self.adapter(images, return_output=True), target, self.current_epoch)  # LPT
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The next batch, so that a run can resume in the middle of an epoch."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, position = divmod(done, len(self.sampler))
        checkpoint["sampler"] = {**self.sampler.state_dict(), "epoch": epoch, "position": position}  # LPT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Begin at the batch after the checkpoint's."""
        self.sampler.load_state_dict(checkpoint["sampler"])  # LPT

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD on what the phase trains."""
        trained = self.adapter.trainable_parameters()  # LPT
        optimizer = torch.optim.SGD(trained, lr=self.lr, momentum=0.9, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05, **options: Any
) -> nn.Module:
    """Two phases of LPT on any map-style dataset of (image, label); `options` are the Trainer's."""
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
