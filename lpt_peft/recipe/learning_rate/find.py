"""Learning-rate range test: a few dozen steps with a rising rate, after which the model is as before.

Not here: what the losses of these steps suggest (`curve.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft._random import preserve_random_state
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.data.workers import open_batches
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe.checks import prepare
from lpt_peft.recipe.learning_rate.curve import LearningRateCurve, has_risen
from lpt_peft.recipe.loading.batches import batches, steps_per_epoch
from lpt_peft.recipe.methods import Model, method_of
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.rates import learning_rates
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.train import make_accelerator
from lpt_peft.recipe.training.criteria import Criterion
from lpt_peft.recipe.training.loop import Loop
from lpt_peft.recipe.training.phase import PhaseRun

LOWEST, HIGHEST = 1e-4, 100.0
_MIN_STEPS = 20


def find_learning_rate(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings | None = None,
    *,
    phase: str | None = None,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = 100,
    criterion: Criterion | None = None,
    accelerator: Accelerator | None = None,
    progress: bool | str = True,
) -> LearningRateCurve:
    """Train for a few dozen steps while the learning rate rises, and suggest a rate for a phase.

    The steps are those of `train`, with the same images, loss and optimizer, from the state in which the phase begins.
    Only the schedule differs: step i has the rate `lowest * (highest / lowest) ** (i / (steps - 1))`. The test ends
    early when the loss has risen far above its start. Then parameters, buffers and random generators are restored.

    It works for every `method`. Phase "group" begins with the current shared prompt and head, so test it on an adapter
    whose phase "shared" is trained.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, arXiv 1506.01186, section 3.3. For
    the suggestion see `LearningRateCurve.suggestion`.

    Args:
        model: A wrapped ViT, as in `train`, or any model that `run_phase` accepts.
        dataset: Map-style, yields (image, label).
        labels: Class of every item.
        settings: Settings of the run; None uses the defaults. `head_learning_rate` and `pool_learning_rate` rise in the
            same proportion.
        phase: "shared", "group" or "joint"; None: the first phase that the settings train.
        lowest: First rate. All rates are values of `PhaseSettings.learning_rate`.
        highest: Rate of the last step.
        steps: Number of steps, at least 20.
        criterion: Called as `criterion(output, target, epoch)`, always with epoch 0; None uses `settings.loss`.
        accelerator: An existing accelerator; None creates one from `settings.mixed_precision`.
        progress: As in `train`, without the summary.

    Returns:
        Rates, losses and the suggestion. All processes get the same.

    Raises:
        InputError: As `train`.
        ConfigError: As `train`; or the phase is not among those of the settings, or rates and steps are out of range.
    """
    settings = settings or TrainSettings()
    phase = phase or next(iter(settings.plan), "shared")
    if phase not in settings.plan:
        raise ConfigError(
            f"phase={phase!r} must be among the phases that the settings train: {', '.join(settings.plan) or 'none'}."
        )
    if not (0 < lowest < highest < float("inf") and steps >= _MIN_STEPS):
        raise ConfigError(
            f"lowest={lowest:g}, highest={highest:g} and steps={steps} must be rising rates above 0, and at least "
            f"{_MIN_STEPS} steps."
        )
    accelerator = accelerator or make_accelerator(settings)
    reporter = Reporter(progress, accelerator.is_main_process)
    base = learning_rates(settings.plan[phase], settings).base
    rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    with reporter.unreadable_images(train=dataset), preserve_random_state(), _restored(model, accelerator):
        plain = prepare(model, dataset, labels, settings, criterion=criterion, accelerator=accelerator)
        if isinstance(model, Model):
            method = method_of(model, settings)
            method.begin(phase, dataset, settings, accelerator=accelerator, reporter=reporter, saved=None)
        loop = Loop(
            dataset=dataset,
            labels=plain,
            settings=replace(settings, average=None),
            criterion=criterion,
            accelerator=accelerator,
            history=[],
            reporter=reporter,
        )
        run = loop.start_phase(  # a single epoch, so that weights that depend on the epoch do not change
            model.train(),
            phase,
            settings.plan[phase],
            steps=steps,
            schedule=lambda step: rates[step] / base,
            check_every=1,
        )
        losses = _losses(run, dataset, plain, settings, len(rates), accelerator=accelerator, reporter=reporter)
    return LearningRateCurve(phase=phase, rates=tuple(rates[: len(losses)]), losses=tuple(losses))


def _losses(
    run: PhaseRun,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    steps: int,
    *,
    accelerator: Accelerator,
    reporter: Reporter,
) -> list[float]:
    """Losses of the steps, up to the first that is not finite or the last that counts."""
    loader = batches(
        dataset,
        labels,
        settings,
        run.name,
        epochs=-(-steps // steps_per_epoch(len(labels), settings)),
        num_replicas=accelerator.num_processes,
        rank=accelerator.process_index,
        pin_memory=accelerator.device.type == "cuda",
    )
    losses: list[float] = []
    bar = reporter.phase(
        f"find-lr {run.name}", steps=steps, steps_per_epoch=steps, start=0, images=settings.batch_size, later=0
    )
    with bar as progress, open_batches(loader) as found:
        for images, target in found:
            try:
                losses.append(float(run.training_step(images, target)))
            except StateError:  # the loss or a gradient is not finite: the rate is far too high
                break
            progress.step(run.step, run.current)
            if len(losses) == steps or has_risen(losses):
                break
    return losses


@contextmanager
def _restored(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Restore values, gradients' flags, phase, mode and loss scale on exit; frozen parameters are not copied."""
    adapter = model if isinstance(model, LongTailPromptAdapter) else None
    learned = set() if adapter is None else set(adapter.adapter_state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    phase = None if adapter is None else adapter.phase
    values: dict[str, Tensor] = {
        name: tensor.detach().clone()
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if flags.get(name, True) or name in learned
    }
    modes = {module: module.training for module in model.modules()}
    scaler = accelerator.scaler
    scale = scaler.state_dict() if scaler else None
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        if adapter is not None and phase is not None:
            adapter.phase = phase
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        for module, mode in modes.items():
            module.training = mode
        if scaler and scale is not None:
            scaler.load_state_dict(scale)
