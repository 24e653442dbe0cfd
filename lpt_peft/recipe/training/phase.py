"""State of a phase, a single training step, and saving and restoring that state.

Not here: the images of a step (`batches.py`), and when to save or stop (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpt_peft._random import derive_seed, seeded
from lpt_peft.errors import StateError
from lpt_peft.prompts import PromptPool
from lpt_peft.recipe.loading.batches import split_halves
from lpt_peft.recipe.parallel import average_gradients
from lpt_peft.recipe.rates import base_rate_field, learning_rates
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.average import Values, clone_values, copy_values_, temporarily_set, update_average
from lpt_peft.recipe.training.criteria import Criterion
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.optimizer import PhaseOptimizer
from lpt_peft.recipe.training.rare_predictions import RarePredictionMonitor
from lpt_peft.recipe.training.schedule import Schedule, phase_schedule
from lpt_peft.recipe.training.weight_noise import noisy_values

_CHECK_EVERY = 16  # steps; after a host read an accelerator idles for a moment


class PhaseRun:
    """A phase in progress: parameters, optimizer state, moving average, best epoch and current step.

    Args:
        model: Its parameters that require a gradient are trained.
        name: Of the phase, for seeds, history and messages.
        settings: Settings of all phases.
        phase: Settings of this phase.
        criterion: Called as `criterion(output, target, epoch)`.
        steps: Steps of an epoch.
        accelerator: Precision, device, processes.
        check_every: Steps between calls of `check`; None: 1 on a CPU, where it costs nothing, else 16.
        monitor: Updated with the instance-balanced half of every step.
        schedule: Factor on the peak learning rate of every step; None: warm-up and cosine decay.

    Attributes:
        step: Number of steps done in this phase.
        stopped: Whether any process requested a stop; with several processes known at the next `check`.
        stale: Validations since the best validation.
        trainable: Trained parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        settings: TrainSettings,
        phase: PhaseSettings,
        criterion: Criterion,
        steps: int,
        accelerator: Accelerator,
        check_every: int | None = None,
        monitor: RarePredictionMonitor | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.name, self.model, self.phase, self.steps = name, model, phase, steps
        self.step = self.stale = 0
        self.stopped = False
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": None}
        self.monitor = monitor
        self._settings, self._criterion, self._accelerator = settings, criterion, accelerator
        device = accelerator.device
        self._check_every = check_every or (1 if device.type == "cpu" else _CHECK_EVERY)
        self._forward: Any = torch.compile(model) if settings.compile else model
        self._divergence = DivergenceFlag(device)
        self._stop_requests = torch.zeros((), device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._loss_sum = torch.zeros((), dtype=wide, device=device)
        self._total = phase.epochs * steps
        model.zero_grad(set_to_none=True)  # a gradient left by the caller would be added to that of the first step
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        pool = getattr(model, "pool", None)
        self._pool: PromptPool | None = pool if isinstance(pool, PromptPool) else None
        if self._pool is not None and bool((self._pool.usage < 0).any()):
            self._pool.reset_usage()  # unknown: the prompts come from a file without counts
        self._usage = None if self._pool is None else self._pool.usage.clone()
        self._optimizer = PhaseOptimizer(
            self.trainable, settings, phase, schedule or phase_schedule(phase, self._total), accelerator
        )
        self._average = clone_values(self.trainable) if settings.average else None
        self._best_values: Values | None = None

    @property
    def rate(self) -> str:
        """Name and value of the setting that determines the learning rate, for messages."""
        return f"{base_rate_field(self._settings)} (now {learning_rates(self.phase, self._settings).base:g})"

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.step // self.steps

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is exhausted."""
        patience = self._settings.patience
        return self.step >= self._total or (patience is not None and self.stale >= patience)

    def training_step(self, images: Tensor, target: Tensor, stop: Callable[[], bool] = lambda: False) -> Tensor:
        """Do a training step without waiting for the device, which `check` reads every `check_every` steps.

        A step whose loss or gradient is not finite changes nothing, and neither does any later step.

        Args:
            images: This process's share of a batch, (batch_size / R, ...), instance-balanced half first.
            target: Labels (batch_size / R,).
            stop: Called at the end of the step; True on any process requests all processes to stop.

        Returns:
            Loss of the step over all processes, a scalar on the device.

        Raises:
            StateError: A loss or a gradient is NaN or infinite, in this step or since the last check.
        """
        device, settings = self._accelerator.device, self._settings
        seed = derive_seed(settings.seed, self.name, "step", self.step, self._accelerator.process_index)
        usage = None if self._pool is None else self._pool.usage.clone()
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        loss = torch.zeros((), device=device)
        noisy = noisy_values(self.trainable, settings, self.name, self.step)
        with temporarily_set(self.trainable, noisy), seeded(seed, device):
            for chunk, labels in split_halves(images, target, settings.accumulate):
                with self._accelerator.autocast():
                    output = self._forward(chunk, return_output=True)
                chunk_loss = self._criterion(output, labels, self.epoch) / settings.accumulate
                self._accelerator.backward(chunk_loss)
                if self.monitor is not None:
                    half = len(labels) // 2
                    self.monitor.update(output.logits[:half], labels[:half])
                loss = loss + chunk_loss.detach()
        gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
        if self._accelerator.num_processes > 1:
            scalars = (loss, torch.full_like(loss, float(stop())))
            loss, requests = average_gradients(self._accelerator, gradients, scalars).unbind()
            self._stop_requests = torch.maximum(self._stop_requests, requests)
        else:
            self.stopped = stop()
        # A gradient scaler handles infinite gradients itself: it skips the step and lowers the scale.
        self._divergence.update(self.step, loss, () if self._accelerator.scaler else gradients)
        self._optimizer.update(self.step, gradients, self._divergence)
        if self._average is not None and settings.average is not None:
            update_average(self._average, self.trainable, settings.average, self.step, self._divergence.found_inf)
        diverged = self._divergence.found_inf > 0
        self._loss_sum += torch.where(diverged, 0.0, loss)
        if self._pool is not None and usage is not None:
            self._pool.usage.copy_(torch.where(diverged, usage, self._pool.usage))
        self.step += 1
        if self.step % self._check_every == 0 or self.step % self.steps == 0:
            self.check()
        return loss

    def check(self) -> None:
        """Read stop requests and divergence from the device.

        All processes must call it after the same step.

        Raises:
            StateError: A loss or a gradient was NaN or infinite; the state is that before the step.
        """
        if self._accelerator.num_processes > 1:
            self.stopped = bool(self._stop_requests > 0)
        if (first := self._divergence.first()) is not None:
            self.step, loss = first
            self._optimizer.clear_gradients()
            event = "The loss became" if not math.isfinite(loss) else "A gradient became infinite or NaN at a loss of"
            raise StateError(
                f"{event} {loss} in step {self.step} (epoch {self.epoch}) of phase {self.name}. The step was skipped, "
                f"and earlier checkpoints are intact. Lower {self.rate}, set clip_norm, or check the images."
            )

    def end_epoch(self) -> dict[str, Any]:
        """Return the record of the epoch just completed, and reset its sums."""
        record = {"phase": self.name, "epoch": self.epoch - 1, **self.current()}
        if self._settings.clip_norm is not None:
            record["clipped"] = int(self._optimizer.clipped) / self.steps
        if self._accelerator.scaler:
            record["loss_scale"] = self._accelerator.scaler.get_scale()
        self._loss_sum.zero_()
        self._optimizer.clipped.zero_()
        return record

    def current(self) -> dict[str, float]:
        """Mean loss of the current epoch and learning rate of the last step; waits for the device."""
        steps = self.step % self.steps or self.steps
        return {"loss": float(self._loss_sum) / steps, "learning_rate": self._optimizer.learning_rate}

    def record_validation(self, score: float) -> None:
        """Compare a validation of `averaged_parameters` with the best so far.

        Args:
            score: Balanced accuracy.
        """
        if score > self.best["score"]:
            self.best, self.stale = {"score": score, "epoch": self.epoch - 1}, 0
            if self._settings.keep == "best":
                self._best_values = clone_values(self.trainable if self._average is None else self._average)
        else:
            self.stale += 1

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Temporarily set the model to the moving average, if enabled."""
        with temporarily_set(self.trainable, self._average):
            yield

    def finalize(self) -> None:
        """Set the model to the phase's result: average or best epoch, and usage summed over all processes."""
        result = self._best_values if self._best_values is not None else self._average
        if result is not None:
            copy_values_(self.trainable, result)
        if self._pool is not None:
            self._pool.usage.copy_(self._total_usage())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON for `restore`, in addition to the model's; all processes must call it.

        Raises:
            StateError: As `check`.
        """
        self.check()
        tensors: dict[str, Tensor] = {}
        kinds = {**self._optimizer.state(), "average": self._average, "best": self._best_values}
        for kind, values in kinds.items():
            tensors |= {f"{kind}/{name}": tensor for name, tensor in (values or {}).items()}
        if self._pool is not None:
            tensors["usage"] = self._total_usage()
        scaler = self._accelerator.scaler
        best = self.best if self.best["epoch"] is not None else None
        return tensors, {
            "step": self.step,
            "loss": float(self._loss_sum),
            "learning_rate": self._optimizer.learning_rate,
            "clipped": int(self._optimizer.clipped),
            "stale": self.stale,
            "best": best,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore the result of `state`; the model's own values must be restored already."""
        device = self._accelerator.device
        kinds: dict[str, Values] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = tensor.to(device, copy=True)
        self._optimizer.load_state(kinds)
        self._average, self._best_values = kinds.get("average"), kinds.get("best")
        if self._pool is not None:
            self._usage = kinds["usage"][""]
            self._pool.usage.copy_(self._usage)
        self.step, self.stale = numbers["step"], numbers["stale"]
        self._optimizer.learning_rate = numbers["learning_rate"]
        self._optimizer.clipped.fill_(numbers["clipped"])
        self._loss_sum.fill_(numbers["loss"])
        self.best = numbers["best"] or self.best
        if numbers["scaler"] and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(numbers["scaler"])

    def _total_usage(self) -> Tensor:
        """How often each group was selected: before the phase, and during it on all processes."""
        assert self._pool is not None and self._usage is not None  # noqa: S101, PT018 - narrows the types
        used: Tensor = self._accelerator.reduce(self._pool.usage - self._usage, "sum")
        return self._usage + used
