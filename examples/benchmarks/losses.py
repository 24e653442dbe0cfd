"""Forward and backward time of the losses compared with cross-entropy, at the size of iNaturalist 2018.

    python examples/benchmarks/losses.py [--device cuda] [--threads 1]

Prints medians of interleaved rounds with their ratios to `torch.nn.functional.cross_entropy`. In "train" mode the
losses draw noise, which takes most of the time on a CPU because torch generates random numbers sequentially.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from lpt_peft.losses import AGCLLoss, LPTLoss


def variants(logits: Tensor, target: Tensor, counts: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward steps by name, all with the same logits."""
    agcl, lpt = AGCLLoss(counts), LPTLoss(counts, epochs=10)
    noiseless, noiseless_lpt = AGCLLoss(counts).eval(), LPTLoss(counts, epochs=10).eval()
    output = SimpleNamespace(logits=logits, similarity=logits.new_zeros(len(logits), 0))
    soft_target = torch.lerp(
        F.one_hot(target, len(counts)).float(), F.one_hot(target.flip(0), len(counts)).float(), 0.3
    )
    losses: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: F.cross_entropy(logits, target),
        "AGCLLoss, train": lambda: agcl(logits, target),
        "AGCLLoss, eval": lambda: noiseless(logits, target),
        "AGCLLoss, soft target": lambda: agcl(logits, soft_target),
        "LPTLoss, train": lambda: lpt(output, target),
        "LPTLoss, eval": lambda: noiseless_lpt(output, target),
    }
    steps: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: torch.autograd.grad(loss(), logits)) for name, loss in losses.items()
    }
    return {**steps, "the noise alone": lambda: torch.empty_like(logits).normal_(0, 1 / 3).clamp_(-1, 1)}


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall-clock time of a call, synchronized before and after."""
    synchronize = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def main(rows: int = 256, classes: int = 8_142, rounds: int = 25, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (40 * torch.rand(rows, classes, generator=generator) - 20).to(device).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    counts = torch.randint(2, 1000, (classes,), generator=generator).to(device)
    steps = variants(logits, target, counts)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            elapsed = seconds(step, device)
            if number >= 2:  # the first two rounds warm up
                times[name].append(elapsed)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {rows} x {classes}, float32")
    print(f"{'forward + backward':24}{'median ms':>12}{'least ms':>12}{'ratio of medians':>20}{'of least':>12}")
    base, least = (measure(times["cross_entropy"]) for measure in (statistics.median, min))
    for name, values in times.items():
        middle, low = statistics.median(values), min(values)
        print(f"{name:24}{middle * 1e3:>12.2f}{low * 1e3:>12.2f}{middle / base:>20.2f}{low / least:>12.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(rounds=arguments.rounds, device=arguments.device)
