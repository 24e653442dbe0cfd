"""Measures the cost of prompts on a CPU: times as ratios to the plain backbone, and memory saved for backward.

Prints medians of an interleaved run, so that load on the machine affects all variants equally, and the median over the
rounds of one pass (`query="block_k"`) divided by phase "shared". For a GPU, see `gpu.py`.

    python examples/benchmarks/forward_cost.py --model vit_small_patch16_224 --batch-size 8
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
import tyro
from _measure import device_name, interleaved, saved_bytes
from _variants import TokenConcatenation
from torch import Tensor

from lpt_peft import LongTailPromptAdapter

SHARED, ONE_PASS = "adapter, phase shared", "adapter, group, block_k"


@dataclass
class Settings:
    """Settings of the benchmark."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 8
    prompt_length: int = 10
    rounds: int = 7


def main(settings: Settings) -> None:
    """Run the benchmark and print the table."""
    plain = timm.create_model(settings.model, num_classes=0).eval()
    plain.requires_grad_(False)
    adapter = LongTailPromptAdapter.wrap(
        copy.deepcopy(plain), 100, prompt_length=settings.prompt_length, query="final"
    ).eval()
    group = copy.deepcopy(adapter)
    group.phase = "group"
    one_pass = LongTailPromptAdapter.wrap(
        copy.deepcopy(plain), 100, prompt_length=settings.prompt_length, query="block_k"
    ).eval()
    one_pass.phase = "group"
    tokens = TokenConcatenation(copy.deepcopy(plain), 100, settings.prompt_length).eval()
    images = torch.randn(settings.batch_size, 3, *plain.patch_embed.img_size)
    pixels = images.clone().requires_grad_()  # the plain backbone's backward pass ends at the pixels
    variants: dict[str, Callable[[bool], Tensor]] = {
        "plain backbone": lambda training: plain(pixels if training else images),
        "token concatenation": lambda training: tokens.features(images),
        SHARED: lambda training: adapter(images),
        "adapter, phase group": lambda training: group(images),
        ONE_PASS: lambda training: one_pass(images),
    }

    def run(name: str, training: bool) -> None:
        with torch.set_grad_enabled(training):
            out = variants[name](training)
            if training:
                out.sum().backward()

    passes = {(name, training): partial(run, name, training) for name in variants for training in (False, True)}
    seconds = interleaved(passes, settings.rounds, images.device)
    parameters = {
        t.untyped_storage().data_ptr() for m in (plain, tokens, adapter, group, one_pass) for t in m.parameters()
    }
    base = {training: statistics.median(seconds["plain backbone", training]) for training in (False, True)}
    print(
        f"{settings.model}, batch {settings.batch_size}, prompt length {settings.prompt_length}, float32, "
        f"{device_name(images.device)}"
    )
    print(f"{'':24}{'eval':>8}{'train':>8}{'saved for backward':>20}")
    for name, forward in variants.items():
        ratios = [statistics.median(seconds[name, training]) / base[training] for training in (False, True)]
        saved = saved_bytes(partial(forward, True), parameters) / 2**20
        print(f"{name:24}{ratios[0]:8.3f}{ratios[1]:8.3f}{saved:16.0f} MiB")
    pairs = zip(seconds[ONE_PASS, False], seconds[SHARED, False], strict=True)
    ratio = statistics.median(one_pass_time / shared_time for one_pass_time, shared_time in pairs)
    print(f"{ONE_PASS} / {SHARED}, eval, median of the rounds' ratios: {ratio:.3f}")
    print(f"plain backbone: {base[False]:.3f} s eval, {base[True]:.3f} s forward and backward")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
