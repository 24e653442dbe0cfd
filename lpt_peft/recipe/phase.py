"""PhaseRun: all that changes while a phase is trained, one step of it, and the way to save and restore that.

Not here: which images a step sees (`batches.py`), when to save and when to stop (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpt_peft._random import seeded
from lpt_peft.errors import StateError
from lpt_peft.prompts import PromptPool, decay_selected
from lpt_peft.recipe.average import Values, instead, move_average, put, values_of
from lpt_peft.recipe.criteria import Criterion
from lpt_peft.recipe.parallel import mean_gradients, summed
from lpt_peft.recipe.randomness import seed_of
from lpt_peft.recipe.schedule import warmup_cosine
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings


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

    Attributes:
        step: Steps done, counted from the beginning of the phase.
        learning_rate: Of the step done last.
        stopped: The last step was asked, by any process, to be the last for now.
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
    ) -> None:
        self.name, self.model, self.phase, self.steps = name, model, phase, steps
        self.step = self.stale = 0
        self.loss = self.learning_rate = 0.0
        self.stopped = False
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": None}
        self._settings, self._criterion, self._accelerator = settings, criterion, accelerator
        self._total, self._warmup = phase.epochs * steps, round(phase.warmup * phase.epochs * steps)
        self.learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
        pool = getattr(model, "pool", None)
        self._pool: PromptPool | None = pool if isinstance(pool, PromptPool) else None
        self._usage = None if self._pool is None else self._pool.usage.clone()
        self._apart = {n for n in self.learnt if n.startswith("pool.")} if settings.decay == "selected" else set()
        self._optimizer = self._sgd()
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

    def advance(self, images: Any, target: Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        """One step on this process's share of a batch, (2 B / R, ...), instance-balanced half first.

        `stop` is asked at its end; what one process answers, all hear.

        Raises:
            StateError: The loss or a gradient is NaN or infinite; nothing was changed.
        """
        device, settings = self._accelerator.device, self._settings
        key = (settings.seed, self.name, "step", self.step, self._accelerator.process_index)
        loss = torch.zeros((), device=device)
        with seeded(seed_of(*key), device):
            for part, labels in _parts(images, target, settings.accumulate):
                with self._accelerator.autocast():
                    output = self.model(part.to(device), return_output=True)
                share = self._criterion(output, labels.to(device), self.epoch) / settings.accumulate
                self._accelerator.backward(share)
                loss = loss + share.detach()
        asked = torch.tensor(float(stop()), device=device)
        means = mean_gradients(self.learnt.values(), (loss, asked))
        value = float(means[-2])
        scaler = self._accelerator.scaler
        sound = means[-2].isfinite() if scaler else means.isfinite().all()  # a scaler skips infinite gradients
        if not bool(sound):
            self._refuse(value)
        self._update(scaler)
        self.stopped = float(means[-1]) > 0
        self.loss += value
        self.step += 1

    def end_epoch(self) -> dict[str, Any]:
        """The record of the epoch just done."""
        record = {
            "phase": self.name,
            "epoch": self.epoch - 1,
            "loss": self.loss / self.steps,
            "learning_rate": self.learning_rate,
        }
        self.loss = 0.0
        return record

    def judge(self, score: float) -> None:
        """Take note of a validation of what `result` gives."""
        if score > self.best["score"]:
            self.best, self.stale = {"score": score, "epoch": self.epoch - 1}, 0
            if self._settings.keep == "best":
                self._best_values = dict(values_of(self.learnt) if self._average is None else _copy(self._average))
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
        """Tensors and plain JSON from which `restore` goes on, besides the model's; all processes must call it."""
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
        numbers = {"step": self.step, "loss": self.loss, "learning_rate": self.learning_rate, "stale": self.stale}
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
        self.step, self.loss, self.stale = numbers["step"], numbers["loss"], numbers["stale"]
        self.learning_rate = numbers["learning_rate"]
        self.best = numbers["best"] or self.best
        if numbers["scaler"] and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(numbers["scaler"])

    def _update(self, scaler: Any) -> None:
        factor = self._settings.batch_size / 256 * warmup_cosine(self.step, self._total, self._warmup)
        self.learning_rate = self.phase.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        if scaler:
            scaler.unscale_(self._optimizer)
        for name in self._apart:
            decay_selected(self.learnt[name], self.phase.weight_decay)
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.learnt.values(), self._settings.clip_norm)
        if scaler:
            scaler.step(self._optimizer)
            scaler.update()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None and self._settings.average is not None:
            move_average(self._average, self.learnt, self._settings.average, self.step)

    def _sgd(self) -> torch.optim.SGD:
        """Over all that is learnt; the pool without a decay of its own where only chosen groups shall decay."""
        groups = [
            {
                "params": [p for n, p in self.learnt.items() if n not in self._apart],
                "weight_decay": self.phase.weight_decay,
            },
            {"params": [p for n, p in self.learnt.items() if n in self._apart], "weight_decay": 0.0},
        ]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=self.phase.momentum)

    def _used(self) -> Tensor:
        """How often groups were chosen: before the phase, and in it by the images of all processes."""
        assert self._pool is not None and self._usage is not None  # noqa: S101, PT018 - narrows the types
        return self._usage + summed(self._pool.usage - self._usage)

    def _refuse(self, loss: float) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        what = "The loss became" if not math.isfinite(loss) else "A gradient became infinite or NaN at a loss of"
        raise StateError(
            f"{what} {loss} in step {self.step} (epoch {self.epoch}) of phase {self.name}. The step was not taken, and "
            f"what was saved before is whole. Lower learning_rate (now {self.phase.learning_rate:g}), set clip_norm, "
            "or look for broken images."
        )


def _parts(images: Tensor, target: Tensor, number: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Cut a batch of two halves into `number` batches of two halves."""
    if number == 1:
        return [(images, target)]
    pairs = zip(*(half.chunk(number) for half in images.chunk(2)), strict=True)
    labels = zip(*(half.chunk(number) for half in target.chunk(2)), strict=True)
    return [(torch.cat(pair), torch.cat(label)) for pair, label in zip(pairs, labels, strict=True)]


def _copy(values: Values) -> Values:
    return {name: tensor.clone() for name, tensor in values.items()}
