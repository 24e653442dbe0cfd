"""A plain PyTorch training loop with LPT; the lines marked LPT are the changes.

pip install -e ".[demo]"
python examples/plain_torch.py                              # or: torchrun --nproc-per-node 2 examples/plain_torch.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
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
        model.phase = phase  # LPT
        criterion = LPTLoss(class_counts, epochs).to(device)  # LPT
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
        net = DistributedDataParallel(model) if dist.is_initialized() else model  # a new wrapper for each phase
        net.train()
        for epoch in range(epochs):
            sampler.set_epoch(epoch)  # LPT
            criterion.set_epoch(epoch)  # LPT
            for images, target in loader:
                output = net(images.to(device), return_output=True)
                loss = criterion(output, target.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"phase {phase}, epoch {epoch}: loss {loss.item():.3f}")
    return model.eval()


if __name__ == "__main__":
    from lpt_peft.data.digits import DigitsLT
    from lpt_peft.demo import glyph_vit

    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    digits = DigitsLT("train", augment=True)
    model = train(glyph_vit(), digits, digits.labels)
    with torch.no_grad():
        hits = [model(image[None].to(model.device)).argmax().item() == label for image, label in DigitsLT("test")]
    print(f"test accuracy {sum(hits) / len(hits):.1%}")
    model.save_pretrained("digits-prompts", is_main_process=not dist.is_initialized() or dist.get_rank() == 0)
