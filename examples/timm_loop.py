"""A training loop in the style of timm's train.py with LPT; the lines marked LPT are the changes.

pip install -e ".[demo]"
python examples/timm_loop.py                                # or: torchrun --nproc-per-node 2 examples/timm_loop.py

Optimizer, schedule and meters are timm's. The loader is PyTorch's, because timm's does not take a batch sampler.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, dispatch_clip_grad
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lpt_peft import DualSampler, LongTailPromptAdapter, LPTLoss


def train(vit: nn.Module, dataset: Dataset, labels: list[int], epochs: int = 10, lr: float = 0.05) -> nn.Module:
    """Train both phases of LPT on a map-style dataset of (image, label), on any number of processes."""
    class_counts = torch.bincount(torch.tensor(labels))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LongTailPromptAdapter.wrap(vit, len(class_counts)).to(device)  # LPT
    sampler = DualSampler(labels, batch_size=64)  # LPT; under a process group, each rank draws its share
    loader = DataLoader(dataset, batch_sampler=sampler)
    for phase in ("shared", "group"):  # LPT
        model.phase = phase  # LPT; create_optimizer_v2 takes the trainable parameters, so make a new one
        criterion = LPTLoss(class_counts, epochs).to(device)  # LPT
        optimizer = create_optimizer_v2(model, opt="sgd", lr=lr, momentum=0.9, weight_decay=0.01)
        total = epochs * len(loader)
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=total,
            warmup_t=total // 20,
            warmup_prefix=True,
            warmup_lr_init=lr / 20,
            t_in_epochs=False,
        )
        net = DistributedDataParallel(model) if dist.is_initialized() else model  # a new wrapper for each phase
        net.train()
        for epoch in range(epochs):
            sampler.set_epoch(epoch)  # LPT
            criterion.set_epoch(epoch)  # LPT
            losses = AverageMeter()
            for step, (images, target) in enumerate(loader, epoch * len(loader)):
                loss = criterion(net(images.to(device), return_output=True), target.to(device))
                optimizer.zero_grad()
                loss.backward()
                dispatch_clip_grad(model.trainable_parameters(), value=5.0)
                optimizer.step()
                schedule.step_update(step + 1)
                losses.update(loss.item(), len(images))
            print(f"phase {phase}, epoch {epoch}: loss {losses.avg:.3f}")
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    rank = init_distributed_device_so("cuda" if torch.cuda.is_available() else "cpu")["global_rank"]
    digits = DigitsLT("train", augment=True)
    train(glyph_vit(), digits, digits.labels).save_pretrained("digits-prompts", is_main_process=rank == 0)
