"""Measures the cost of prompts on a GPU, compared with the plain ViT and other ways to adapt it, in under five minutes.

Every table is for one precision, batch size and mode (eager or compiled). Its cells are measured in interleaved rounds,
by CUDA events on a GPU and by wall-clock time on a CPU; each number is the median over the rounds. Ratios are to the
plain ViT in evaluation and to full tuning in a training step. The last table is for the losses alone.

    python examples/benchmarks/gpu.py --json gpu.json
    python examples/benchmarks/gpu.py --tiny   # seconds on a CPU: a test of the script; its times are meaningless

It needs only torch, timm and lpt_peft. All rows are trained by SGD with momentum: the adapter with LPTLoss, the
others with cross-entropy. LoRA is the minimal module of `_variants.py`, not PEFT's. "bf16 weights" casts the ViT and
runs without autocast; trained parameters outside the ViT stay float32. Peak memory is that of a single cell: weights,
optimizer state and the peak of a call. The time budget drops the least important cells first and lists them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from _gpu_options import TINY_VIT, parse
from _gpu_report import BASE, COLUMNS, Cell, LossTime, Report, Table
from _measure import interleaved, seconds
from _variants import LinearProbe, LoRA, TokenConcatenation
from torch import Tensor, nn

from lpt_peft import AGCLLoss, LongTailPromptAdapter, LPTLoss

T = TypeVar("T")

PLAIN, FULL = BASE["eval"], BASE["step"]
PROBE, LORA, TOKENS = "frozen + head", "LoRA r=16 on qkv", "token concatenation"
SHARED, GROUP = "adapter, phase shared", "adapter, phase group"
ROWS = (PLAIN, FULL, PROBE, LORA, TOKENS, SHARED, GROUP)
# Cells by importance: the last are dropped first. Evaluating "full tuning" measures the plain ViT a second time.
IMPORTANCE = [(PLAIN, "eval"), (FULL, "step")]
IMPORTANCE += [(row, column) for row in (GROUP, SHARED, TOKENS, LORA) for column in COLUMNS]
IMPORTANCE += [(PROBE, "step"), (PROBE, "eval"), (FULL, "eval")]
MIN_ROUNDS = 3


class Benchmark:
    """A run on one device within a time budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self.start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.compilations: list[float] = []  # seconds
        size = TINY_VIT if options.tiny else {"img_size": options.image_size} if options.image_size else {}
        with self.device:
            self.vit = timm.create_model(options.model, num_classes=options.classes, **size)
        if type(self.vit).__name__ != "VisionTransformer":
            sys.exit(f"--model {options.model} is a {type(self.vit).__name__}; give a VisionTransformer of timm.")
        settings = itertools.product(options.modes, options.precisions, options.batch)
        self.report = Report(
            settings=vars(options),
            device=self.device,
            image_size=self.vit.patch_embed.img_size[0],
            tables=[
                Table(precision, batch, mode, [Cell(row, column) for row in ROWS for column in COLUMNS])
                for mode, precision, batch in settings
            ],
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return float(self.options.budget) - self.elapsed

    @property
    def next_compilation(self) -> float:
        """Estimated seconds of another compilation: the longest so far, or a guess."""
        return max(self.compilations, default=40.0 if self.device.type == "cuda" else 0.0)

    def run(self) -> Report:
        """Measure all tables, the most important first."""
        options = self.options

        def unimportance(table: Table) -> tuple[int, int]:
            rank = options.precisions.index(table.precision) + options.batch.index(table.batch)
            return options.modes.index(table.mode), rank

        order = sorted(self.report.tables, key=unimportance)
        for number, table in enumerate(order):
            self.log(f"{table.title}: {max(self.left, 0):.0f} s left")
            # A compiled table may use the whole budget: compilation takes most of it, and no later table needs it.
            share = self.left / (len(order) - number) if table.mode == "eager" else self.left
            self.measure(table, self.elapsed + share)
            if number == 0:
                self.measure_losses()
        self.report.seconds = self.elapsed
        return self.report

    def log(self, message: str) -> None:
        """Print a line of progress to standard error."""
        print(f"[{self.elapsed:6.1f} s] {message}", file=sys.stderr, flush=True)

    def measure(self, table: Table, until: float) -> None:
        """Measure the cells of a table in interleaved rounds, until `until` seconds after the start."""
        torch._dynamo.reset()  # so that models of earlier tables do not count towards the recompilation limit
        ready: list[tuple[Cell, Callable[[], object], int]] = []
        reserve = 0.0  # seconds of the minimum number of rounds
        table.cell(PLAIN, "step").state = "does not exist"
        for cell in (table.cell(*key) for key in IMPORTANCE):
            if self.left < reserve + (self.next_compilation if table.mode == "compiled" else 0):
                cell.state = "dropped"
                continue
            prepared = self.guarded(table, cell, partial(self.prepare, table, cell))
            if prepared is not None:
                call, calls, warm = prepared
                ready.append((cell, call, calls))
                reserve += MIN_ROUNDS * calls * warm
        for number in range(self.options.repeats):
            if (number >= MIN_ROUNDS and self.elapsed > until) or (number and self.left < 0):
                self.log(f"{table.title}: time for {number} of {self.options.repeats} rounds")
                break
            for cell, call, calls in ready if number % 2 == 0 else reversed(ready):
                if cell.state == "measured":
                    sample = self.guarded(table, cell, partial(seconds, call, self.device, calls))
                    cell.samples += [] if sample is None else [sample]
        ready.clear()
        self.free_memory()

    def guarded(self, table: Table, cell: Cell, action: Callable[[], T]) -> T | None:
        """Return the result, or None after recording the failure in the cell, so that it does not end the run."""
        try:
            return action()
        except torch.OutOfMemoryError:
            cell.state = "out of memory"
        except Exception as error:  # from the compiler, a kernel or the model: all are reported
            cell.state = "failed"
            cell.error = f"{type(error).__name__}: {str(error).strip()[:300]}"
        cell.samples.clear()
        self.log(f"{table.title}: {cell.row}, {cell.column}: {cell.state} {cell.error}")
        self.free_memory()
        return None

    def free_memory(self) -> None:
        """Release the memory of deleted models."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, table: Table, cell: Cell) -> tuple[Callable[[], object], int, float]:
        """Return a warm call, the calls in a sample and the seconds of a call; store the sizes in the cell."""
        model, optimizer, call = self.build(table, cell)
        start = time.perf_counter()
        seconds(call, self.device)
        if table.mode == "compiled":
            self.compilations.append(time.perf_counter() - start)
        warm = min(seconds(call, self.device) for _ in range(2))
        if self.device.type == "cuda":
            state = [] if optimizer is None else optimizer.state.values()
            held = [value for values in state for value in values.values() if isinstance(value, Tensor)]
            held += [*model.parameters(), *model.buffers()]
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            peak = torch.cuda.max_memory_allocated(self.device) - before
            cell.peak_bytes = peak + sum(tensor.nbytes for tensor in held)
        return call, 1 if self.device.type == "cpu" else min(10, max(1, round(0.02 / warm))), warm

    def build(self, table: Table, cell: Cell) -> tuple[nn.Module, torch.optim.Optimizer | None, Callable[[], object]]:
        """Return model, optimizer and the call to time."""
        options, training = self.options, cell.column == "step"
        dtype = torch.bfloat16 if table.precision == "bf16 weights" else torch.float32
        model, images = self.model(cell.row, dtype), self.images(table.batch, dtype)
        if is_adapter := isinstance(model, LongTailPromptAdapter):
            parameters = list(model.trainable_parameters())
        else:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        cell.trained = sum(parameter.numel() for parameter in parameters)
        model.train(training)
        run: Callable[..., Any] = model
        if table.mode == "compiled":
            run = torch.compile(model, dynamic=False, backend=options.backend)
        context: Callable[[], Any] = nullcontext
        if table.precision == "bf16 autocast":
            context = partial(torch.autocast, self.device.type, torch.bfloat16)

        def evaluate() -> None:
            with torch.no_grad(), context():
                run(images)

        if not training:
            return model, None, evaluate
        target = torch.arange(table.batch, device=self.device) % options.classes
        criterion = LPTLoss(long_tailed_counts(options.classes), epochs=10).to(self.device)
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

        def step() -> None:
            with context():
                if is_adapter:
                    loss = criterion(run(images, return_output=True), target, 0)
                else:
                    loss = F.cross_entropy(run(images).float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return model, optimizer, step

    def model(self, row: str, dtype: torch.dtype) -> nn.Module:
        """Return a new copy of the ViT, adapted as the row says."""
        options = self.options
        vit: Any = copy.deepcopy(self.vit).to(dtype)
        if row in (PLAIN, FULL):
            plain: nn.Module = vit
            return plain
        if row in (SHARED, GROUP):
            adapter = LongTailPromptAdapter.wrap(
                vit, options.classes, prompt_length=options.prompt_length, query="final"
            )
            adapter.phase = "group" if row == GROUP else "shared"
            return adapter
        vit.reset_classifier(0)
        if row == PROBE:
            return LinearProbe(vit, options.classes)
        if row == LORA:
            return LoRA(vit, options.classes, rank=16)
        return TokenConcatenation(vit, options.classes, options.prompt_length)

    @functools.cache  # noqa: B019 - one benchmark in a process
    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Random images, the same for every cell."""
        size = self.report.image_size
        return torch.randn(batch, 3, size, size, device=self.device).to(dtype)

    def measure_losses(self) -> None:
        """Measure forward and backward of the losses alone, at the first batch size."""
        batch = self.options.batch[0]
        for classes in self.options.loss_classes:
            counts = long_tailed_counts(classes)
            logits = 20 * torch.rand(batch, classes, device=self.device).mul(2).sub(1)
            logits.requires_grad_()
            similarity = torch.rand(batch, 2, device=self.device, requires_grad=True)
            target = torch.arange(batch, device=self.device) % classes
            agcl, lpt = AGCLLoss(counts).to(self.device), LPTLoss(counts, epochs=10).to(self.device)
            output = SimpleNamespace(logits=logits, similarity=similarity)
            losses: dict[str, Callable[[], Tensor]] = {
                "cross-entropy": partial(F.cross_entropy, logits, target),
                "AGCLLoss": partial(agcl, logits, target),
                "LPTLoss": partial(lpt, output, target, 0),
            }
            actions = {name: partial(_forward_and_backward, loss) for name, loss in losses.items()}
            samples = interleaved(actions, self.options.repeats, self.device, calls=10)
            self.report.losses += [LossTime(name, classes, batch, values) for name, values in samples.items()]


def _forward_and_backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def long_tailed_counts(classes: int) -> list[int]:
    """Class counts that decrease exponentially from 1,000 to 5."""
    return [round(1000 * 0.005 ** (index / (classes - 1))) for index in range(classes)]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the benchmark and print the report."""
    options = parse(arguments, __doc__)
    torch.manual_seed(0)
    # Every cell compiles the same forward for another model; beyond the limit it would silently run uncompiled.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        report = Benchmark(options).run()
    print(report.markdown())
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(), indent=1, default=str) + "\n")
    return report


if __name__ == "__main__":
    main()
