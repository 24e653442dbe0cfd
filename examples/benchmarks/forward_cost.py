"""What prompts cost: seconds of a pass and memory kept for backward, as ratios to the plain backbone.

All variants are timed in one interleaved run, so that a noisy machine disturbs them alike.

    python examples/benchmarks/forward_cost.py --model vit_small_patch16_224 --batch-size 8
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import tyro
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter


@dataclass
class Settings:
    """What to measure."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 8
    prompt_length: int = 10
    rounds: int = 7


def concatenated(vit: nn.Module, prompts: Tensor, images: Tensor) -> Tensor:
    """The plain alternative: prompt tokens through every block, their outputs dropped."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block, prompt in zip(vit.blocks, prompts, strict=True):
        x = block(torch.cat([x, prompt.expand(len(x), -1, -1)], 1))[:, : x.shape[1]]
    return vit.forward_head(vit.norm(x), pre_logits=True)


def kept_bytes(run: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes that autograd keeps for backward, parameters left out, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    del out
    return sum(kept.values())


def main(settings: Settings) -> None:
    """Measure and print."""
    plain = timm.create_model(settings.model, num_classes=0).eval()
    plain.requires_grad_(False)
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(plain), 100, prompt_length=settings.prompt_length).eval()
    group = copy.deepcopy(adapter)
    group.phase = "group"
    size = plain.patch_embed.img_size
    images = torch.randn(settings.batch_size, 3, *size)
    learnt = images.clone().requires_grad_()  # the plain backbone's backward, from head to pixels
    prompts = adapter.shared.prompts.detach().clone().requires_grad_()
    variants: dict[str, Callable[[bool], Tensor]] = {
        "plain backbone": lambda training: plain(learnt if training else images),
        "token concatenation": lambda training: concatenated(plain, prompts, images),
        "adapter, phase shared": lambda training: adapter(images),
        "adapter, phase group": lambda training: group(images),
    }
    seconds: dict[tuple[str, bool], list[float]] = {(name, t): [] for name in variants for t in (False, True)}
    for turn in range(settings.rounds + 1):  # the first turn warms up
        for (name, training), times in seconds.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = variants[name](training)
                if training:
                    out.sum().backward()
            if turn:
                times.append(time.perf_counter() - start)
    known = {t.untyped_storage().data_ptr() for m in (plain, adapter, group) for t in m.parameters()}
    base = {training: statistics.median(seconds["plain backbone", training]) for training in (False, True)}
    print(f"{settings.model}, batch {settings.batch_size}, prompt length {settings.prompt_length}, float32, CPU")
    print(f"{'':24}{'eval':>8}{'train':>8}{'kept for backward':>20}")
    for name, run in variants.items():
        ratios = [statistics.median(seconds[name, training]) / base[training] for training in (False, True)]
        kept = kept_bytes(lambda run=run: run(True), known) / 2**20
        print(f"{name:24}{ratios[0]:8.3f}{ratios[1]:8.3f}{kept:16.0f} MiB")
    print(f"plain backbone: {base[False]:.3f} s eval, {base[True]:.3f} s forward and backward")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
