"""Cost of a training step: LPT's two phases, full fine-tuning and PEFT's LoRA on the same ViT.

Time is the minimum of several interleaved rounds, since interference only makes a step slower. Memory: tensors that
autograd saves for backward; gradients and optimizer state; and the peak of a process that runs two steps of a single
variant, weights included: of the allocator on a GPU, otherwise resident memory beyond the imports (Linux).
More variants, precisions and torch.compile on a GPU: `gpu.py`.

    python examples/benchmarks/train_step.py
    python examples/benchmarks/train_step.py --model vit_base_patch16_224 --batch-size 128 --dtype bfloat16
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import tyro
from _measure import device_name, interleaved, resident_bytes, saved_bytes
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter, LPTLoss

CLASSES = 100
NAMES = ("full fine-tuning", "LoRA, rank 8 on qkv", "LPT, phase shared", "LPT, phase group")


@dataclass
class Settings:
    """Settings of the measurement."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 16
    """Images of a step, both halves."""
    img_size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""
    rounds: int = 5
    peak_of: str | None = None
    """Only print the peak memory of this variant, in bytes; the table starts a process per variant."""


@dataclass
class Variant:
    """A training method."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    autocast: Any

    def step(self) -> None:
        """Forward, backward, update."""
        self.run_loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run_loss(self) -> Tensor:
        """Compute the loss."""
        with self.autocast():
            return self.loss()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def build(name: str, settings: Settings, images: Tensor, target: Tensor) -> Variant:
    """Build the variant of this name on a new ViT, with the same optimizer."""
    torch.manual_seed(0)
    size = {} if settings.img_size is None else {"img_size": settings.img_size}
    vit = timm.create_model(settings.model, num_classes=CLASSES, **size).train()
    criterion: Any = F.cross_entropy
    if name.startswith("LPT"):
        adapter = LongTailPromptAdapter.wrap(vit, CLASSES, query="final").to(images.device).train()
        adapter.phase = "group" if "group" in name else "shared"
        criterion = LPTLoss([10] * CLASSES, epochs=1).to(images.device)
        model: nn.Module = adapter
        loss = lambda: criterion(adapter(images, return_output=True), target, 0)  # noqa: E731
    else:
        lora = LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
        model = (get_peft_model(vit, lora) if "LoRA" in name else vit).to(images.device)
        loss = lambda: criterion(model(images), target)  # noqa: E731
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    half_precision = settings.dtype == "bfloat16"
    autocast = (lambda: torch.autocast(images.device.type, torch.bfloat16)) if half_precision else nullcontext
    return Variant(model, loss, optimizer, autocast)


def peak_bytes(name: str, settings: Settings) -> int:
    """Peak memory of two steps of a variant; this process must not have built anything before."""
    before = resident_bytes()
    variant = build(name, settings, *batch(settings))
    for _ in range(2):  # momentum exists from the start of the second step
        variant.step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes(peak=True) - before


def peak_in_new_process(name: str, settings: Settings) -> int:
    """Peak memory of a variant, measured in a new process."""
    arguments = ["--model", settings.model, "--batch-size", settings.batch_size, "--dtype", settings.dtype]
    arguments += [] if settings.img_size is None else ["--img-size", settings.img_size]
    command = [sys.executable, __file__, *map(str, arguments), "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def batch(settings: Settings) -> tuple[Tensor, Tensor]:
    """Build the images and labels of all steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = settings.img_size or 224
    images = torch.randn(settings.batch_size, 3, size, size, device=device)
    return images, torch.arange(settings.batch_size, device=device) % CLASSES


def main(settings: Settings) -> None:
    """Measure and print."""
    if settings.peak_of is not None:
        print(peak_bytes(settings.peak_of, settings))
        return
    images, target = batch(settings)
    variants = {name: build(name, settings, images, target) for name in NAMES}
    seconds = interleaved({name: variant.step for name, variant in variants.items()}, settings.rounds, images.device)
    print(
        f"{settings.model}, {images.shape[-1]} px, batch {settings.batch_size}, {settings.dtype}, "
        f"{device_name(images.device)}, {settings.rounds} rounds"
    )
    print(f"{'':22}{'s/step':>9}{'ratio':>8}{'trained':>14}{'saved':>11}{'optimizer':>12}{'peak':>11}")
    base = min(seconds[NAMES[0]])
    for name, variant in variants.items():
        least = min(seconds[name])
        trained = sum(parameter.numel() for parameter in variant.trained)
        state = 2 * sum(parameter.nbytes for parameter in variant.trained)  # gradient and momentum
        parameters = {parameter.untyped_storage().data_ptr() for parameter in variant.model.parameters()}
        columns = ((saved_bytes(variant.run_loss, parameters), 7), (state, 8), (peak_in_new_process(name, settings), 7))
        sizes = "".join(f"{value / 2**20:{width}.0f} MiB" for value, width in columns)
        print(f"{name:22}{least:9.3f}{least / base:8.2f}{trained:14,}{sizes}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
