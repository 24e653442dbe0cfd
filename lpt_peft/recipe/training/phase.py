"""PhaseRun: all that changes while a phase is trained, one step of it, and the way to save and restore that.

Not here: which images a step sees (`batches.py`), when to save and when to stop (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpt_peft._random import seeded
from lpt_peft.errors import StateError
from lpt_peft.prompts import PromptPool, decay_selected
from lpt_peft.recipe.loading.batches import cut_halves
from lpt_peft.recipe.parallel import mean_gradients, several, summed
from lpt_peft.recipe.randomness import seed_of
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.average import Values, instead, move_average, put, values_of
from lpt_peft.recipe.training.criteria import Criterion
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.optimizer import make_sgd
from lpt_peft.recipe.training.schedule import warmup_cosine

_CHECK_EVERY = 16  # steps; a read makes the host wait for an accelerator, which then runs out of work for a moment


class PhaseRun:
    """A phase under way: parameters, momentum, moving average, best epoch so far, and where it is.

    Args:
        model: What requires a gradient in it is learnt.
        name: Of the phase, for seeds, history and messages.
        settings: What phases share.
        phase: What is this phase's own.
        criterion: Called as `criterion(output, target, epoch)`.
        steps: Steps of an epoch.
        accelerator: Precision, device, processes.
        check_every: Steps from one `check` to the next; None: 1 on a CPU, where it costs nothing, else 16.

    Attributes:
        step: Steps done, counted from the beginning of the phase.
        learning_rate: Of the step done last.
        stopped: A stop was requested, by any process; with several processes known from the next `check` on.
        stale: Validations since the best one.
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
    ) -> None:
        self.name, self.model, self.phase, self.steps = name, model, phase, steps
        self.step = self.stale = 0
        self.learning_rate = 0.0
        self.stopped = False
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": None}
        self._settings, self._criterion, self._accelerator = settings, criterion, accelerator
        device = accelerator.device
        self._check_every = check_every or (1 if device.type == "cpu" else _CHECK_EVERY)
        self._forward: Any = torch.compile(model) if settings.compile else model
        self._divergence = DivergenceFlag(device)
        self._stop_requests = torch.zeros((), device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._loss_sum = torch.zeros((), dtype=wide, device=device)
        self._total, self._warmup = phase.epochs * steps, round(phase.warmup * phase.epochs * steps)
        self.learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
        pool = getattr(model, "pool", None)
        self._pool: PromptPool | None = pool if isinstance(pool, PromptPool) else None
        self._usage = None if self._pool is None else self._pool.usage.clone()
        self._apart = {n for n in self.learnt if n.startswith("pool.")} if settings.decay == "selected" else set()
        self._optimizer = make_sgd(self.learnt, phase, without_decay=self._apart)
        self._average = values_of(self.learnt) if settings.average else None
        self._best_values: Values | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all steps done, or no better validation for long enough."""
        patience = self._settings.patience
        return self.step >= self._total or (patience is not None and self.stale >= patience)

    def advance(self, images: Tensor, target: Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        """Do one training step, without waiting for the device: it is read by `check`, every `check_every` steps.

        A step whose loss or gradient is not finite changes nothing, and neither does any step after it.

        Args:
            images: This process's share of a batch, (2 B / R, ...), instance-balanced half first.
            target: Labels (2 B / R,).
            stop: Called at the end of the step; True on any process requests all processes to stop.

        Raises:
            StateError: A loss or a gradient is NaN or infinite, in this step or since the last check.
        """
        device, settings = self._accelerator.device, self._settings
        key = (settings.seed, self.name, "step", self.step, self._accelerator.process_index)
        usage = None if self._pool is None else self._pool.usage.clone()
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        loss = torch.zeros((), device=device)
        with seeded(seed_of(*key), device):
            for part, labels in cut_halves(images, target, settings.accumulate):
                with self._accelerator.autocast():
                    output = self._forward(part, return_output=True)
                share = self._criterion(output, labels, self.epoch) / settings.accumulate
                self._accelerator.backward(share)
                loss = loss + share.detach()
        gradients = [parameter.grad for parameter in self.learnt.values() if parameter.grad is not None]
        if several():
            loss, requests = mean_gradients(gradients, (loss, torch.full_like(loss, float(stop())))).unbind()
            self._stop_requests = torch.maximum(self._stop_requests, requests)
        else:
            self.stopped = stop()
        scaler = self._accelerator.scaler
        # A scaler skips steps of infinite gradients by itself, and they are no fault: it tries another scale.
        self._divergence.update(self.step, loss, () if scaler else gradients)
        self._update(scaler, gradients)
        bad = self._divergence.found_inf > 0
        self._loss_sum += torch.where(bad, 0.0, loss)
        if self._pool is not None and usage is not None:
            self._pool.usage.copy_(torch.where(bad, usage, self._pool.usage))
        self.step += 1
        if self.step % self._check_every == 0 or self.step % self.steps == 0:
            self.check()

    def check(self) -> None:
        """Read what the steps left on the device: requests to stop, and whether training diverged.

        All processes must call it after the same step.

        Raises:
            StateError: A loss or a gradient was NaN or infinite; the run is as it was before that step.
        """
        if several():
            self.stopped = bool(self._stop_requests > 0)
        if (first := self._divergence.first()) is not None:
            self.step, loss = first
            self._optimizer.zero_grad(set_to_none=True)
            what = "The loss became" if not math.isfinite(loss) else "A gradient became infinite or NaN at a loss of"
            raise StateError(
                f"{what} {loss} in step {self.step} (epoch {self.epoch}) of phase {self.name}. The step was not taken, "
                f"and what was saved before is whole. Lower learning_rate (now {self.phase.learning_rate:g}), set "
                "clip_norm, or look for broken images."
            )

    def end_epoch(self) -> dict[str, Any]:
        """The record of the epoch just done."""
        record = {
            "phase": self.name,
            "epoch": self.epoch - 1,
            "loss": float(self._loss_sum) / self.steps,
            "learning_rate": self.learning_rate,
        }
        self._loss_sum.zero_()
        return record

    def judge(self, score: float) -> None:
        """Take note of a validation of what `result` gives."""
        if score > self.best["score"]:
            self.best, self.stale = {"score": score, "epoch": self.epoch - 1}, 0
            if self._settings.keep == "best":
                self._best_values = values_of(self.learnt if self._average is None else self._average)
        else:
            self.stale += 1

    @contextmanager
    def result(self) -> Iterator[None]:
        """Inside, the model is what the phase would give now: the moving average, if there is one."""
        with instead(self._average, self.learnt):
            yield

    def finish(self) -> None:
        """Leave the model as the phase gives it: average or best epoch put in, usage counted over all processes."""
        final = self._best_values if self._best_values is not None else self._average
        if final is not None:
            put(final, self.learnt)
        if self._pool is not None:
            self._pool.usage.copy_(self._used())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON from which `restore` continues, besides the model's; all processes must call it.

        Raises:
            StateError: As `check`.
        """
        self.check()
        tensors = {}
        for name, parameter in self.learnt.items():
            if (momentum := self._optimizer.state[parameter].get("momentum_buffer")) is not None:
                tensors[f"momentum/{name}"] = momentum
        for kind, values in (("average", self._average), ("best", self._best_values)):
            tensors |= {f"{kind}/{name}": tensor for name, tensor in (values or {}).items()}
        if self._pool is not None:
            tensors["usage"] = self._used()
        scaler = self._accelerator.scaler
        best = self.best if self.best["epoch"] is not None else None
        loss = float(self._loss_sum)
        numbers = {"step": self.step, "loss": loss, "learning_rate": self.learning_rate, "stale": self.stale}
        return tensors, {**numbers, "best": best, "scaler": scaler.state_dict() if scaler else None}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; the model has its values back already."""
        device = self._accelerator.device
        kinds: dict[str, Values] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = tensor.to(device, copy=True)
        for name, momentum in kinds.get("momentum", {}).items():
            self._optimizer.state[self.learnt[name]]["momentum_buffer"] = momentum
        self._average, self._best_values = kinds.get("average"), kinds.get("best")
        if self._pool is not None:
            self._usage = kinds["usage"][""]
            self._pool.usage.copy_(self._usage)
        self.step, self.stale, self.learning_rate = numbers["step"], numbers["stale"], numbers["learning_rate"]
        self._loss_sum.fill_(numbers["loss"])
        self.best = numbers["best"] or self.best
        if numbers["scaler"] and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(numbers["scaler"])

    def _update(self, scaler: Any, gradients: list[Tensor]) -> None:
        factor = self._settings.batch_size / 256 * warmup_cosine(self.step, self._total, self._warmup)
        self.learning_rate = self.phase.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        if scaler:
            self._divergence.spoil(gradients)
            scaler.unscale_(self._optimizer)
        for name in self._apart:
            decay_selected(self.learnt[name], self.phase.weight_decay)
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.learnt.values(), self._settings.clip_norm)
        if scaler:
            scaler.step(self._optimizer)
            scaler.update()
        else:
            self._optimizer.found_inf = self._divergence.found_inf  # type: ignore[attr-defined]
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None and self._settings.average is not None:
            found_inf = self._divergence.found_inf
            move_average(self._average, self.learnt, self._settings.average, self.step, found_inf)

    def _used(self) -> Tensor:
        """How often groups were chosen: before the phase, and in it by the images of all processes."""
        assert self._pool is not None and self._usage is not None  # noqa: S101, PT018 - narrows the types
        return self._usage + summed(self._pool.usage - self._usage)
