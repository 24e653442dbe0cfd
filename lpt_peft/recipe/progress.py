"""Progress of a run on stderr: a bar on a terminal, otherwise a line per epoch and every few minutes; notes."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from tqdm.auto import tqdm
from tqdm.std import tqdm as terminal_bar

from lpt_peft.data.images import LabelledImages

T = TypeVar("T")
_INTERVAL = 300.0  # seconds between lines within an epoch


class Reporter:
    """Prints notes and progress of a run on stderr, from the main process only.

    Args:
        progress: False prints nothing; a string precedes the name of each phase.
        is_main_process: False prints nothing.
    """

    def __init__(self, progress: bool | str, is_main_process: bool) -> None:
        self._label = f"{progress}: " if isinstance(progress, str) and progress else ""
        self._is_main, self._visible = is_main_process, bool(progress) and is_main_process

    def note(self, text: str) -> None:
        """Print information; nothing if progress is off."""
        if self._visible:
            terminal_bar.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning; a `UserWarning` if progress is off."""
        if self._visible:
            self.note(f"warning: {text}")
        elif self._is_main:
            warnings.warn(text, stacklevel=3)

    @contextmanager
    def unreadable_images(self, **splits: Any) -> Iterator[None]:
        """Name unreadable images once, at the end of the outermost context, instead of the first as found.

        Args:
            **splits: Images by name of their split; every `LabelledImages` among them reports its images. Those of
                "train" are replaced, those of other splits are left out of the counts.
        """
        found: dict[str, LabelledImages] = {}
        for name, split in splits.items():
            if isinstance(split, LabelledImages) and split.unreadable_images.announce:
                found[name] = split
                split.unreadable_images.announce = False
        try:
            yield
        finally:
            for name, split in found.items():
                split.unreadable_images.announce = True
                effects = () if name == "train" else ("they are left out of the counts",)
                if report := split.skipped_report(*effects):
                    self.warn(f"{name}: {report}")

    def track(self, batches: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Yield the batches of a pass without training steps; show a bar on a terminal, or a line every five minutes.

        Args:
            batches: Of the pass.
            name: Of the pass.
            total: Number of batches.
        """
        show_bar = self._visible and has_bar()
        printed = time.monotonic()
        with tqdm(total=total, desc=f"{self._label}{name}", unit="batch", leave=False, disable=not show_bar) as bar:
            for done, batch in enumerate(batches):
                if self._visible and not show_bar and time.monotonic() - printed >= _INTERVAL:
                    printed = time.monotonic()
                    self.note(f"{self._label}{name}: batch {done}/{total}")
                yield batch
                bar.update()

    def phase(self, name: str, *, steps: int, steps_per_epoch: int, start: int, images: int, later: int) -> Progress:
        """Start reporting a phase.

        Args:
            name: Of the phase.
            steps: Number of steps.
            steps_per_epoch: Number of steps in an epoch.
            start: First step.
            images: Images of a step.
            later: Steps of later phases, for the remaining time.
        """
        return Progress(
            f"{self._label}{name}",
            self._visible,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            start=start,
            images=images,
            later=later,
        )


class Progress:
    """Context manager: the bar or lines of a phase; see `Reporter.phase`."""

    def __init__(
        self, name: str, visible: bool, *, steps: int, steps_per_epoch: int, start: int, images: int, later: int
    ) -> None:
        self._name, self._steps, self._per_epoch = name, steps, steps_per_epoch
        self._start, self._images, self._later = start, images, later
        show_bar = visible and has_bar()
        self._lines = visible and not show_bar
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=not show_bar)
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, step: int, current: Callable[[], Mapping[str, Any]]) -> None:
        """Report a completed step.

        Args:
            step: Number of completed steps of the phase.
            current: Returns loss and learning_rate; only called when a line is due, since it may wait for the device.
        """
        self._bar.update()
        if self._lines and step % self._per_epoch and time.monotonic() - self._printed >= _INTERVAL:
            self._print(step, _values(current()))

    def epoch(self, step: int, record: Mapping[str, Any]) -> None:
        """Report the record of a completed epoch."""
        values = _values(record)
        if self._lines:
            self._print(step, values)
        self._bar.set_postfix({name: value for name, value in values.items() if name != "learning rate"})

    def _print(self, step: int, values: Mapping[str, str]) -> None:
        self._printed = time.monotonic()
        rate = (step - self._start) / max(self._printed - self._began, 1e-9)
        left = timedelta(seconds=round((self._steps - step + self._later) / rate))
        epoch, epochs = -(-step // self._per_epoch), self._steps // self._per_epoch
        parts = [f"epoch {epoch}/{epochs}", f"step {step}/{self._steps}"]
        parts += [f"{name} {value}" for name, value in values.items()]
        parts += [f"{rate * self._images:.4g} images/s", f"{left} left"]
        sys.stderr.write(f"{self._name}: {', '.join(parts)}\n")
        sys.stderr.flush()


def _values(record: Mapping[str, Any]) -> dict[str, str]:
    values = {"loss": f"{record['loss']:.4g}", "learning rate": f"{record['learning_rate']:.3g}"}
    if (overall := record.get("validation", {}).get("overall")) is not None:
        values["validation"] = f"{100 * overall:.1f} %"
    return values


def has_bar() -> bool:
    """Whether stderr is a terminal, or this is a notebook."""
    return any("notebook" in kind.__module__ for kind in tqdm.__mro__) or sys.stderr.isatty()
