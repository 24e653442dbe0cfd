"""Progress of a command that reads images, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

from lpt_peft._text import number
from lpt_peft.cli.common.messages import notice

_INTERVAL = 60.0  # seconds between lines


@contextmanager
def image_progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar if standard error is a terminal, a line every minute if it is a file.

    If standard output is a terminal as well, what is printed there shows the progress, and a bar would be torn.

    Args:
        total: Number of images; None if unknown.

    Yields:
        A function that takes the number of images finished since the last call.
    """
    bar = sys.stderr.isatty() and not sys.stdout.isatty()
    started = printed = time.monotonic()
    done = 0
    with tqdm(total=total, unit="image", file=sys.stderr, leave=False, disable=not bar) as shown:

        def advance(count: int) -> None:
            nonlocal done, printed
            done += count
            shown.update(count)
            now = time.monotonic()
            if not sys.stderr.isatty() and now - printed >= _INTERVAL:
                printed = now
                notice(_line(done, total, done / (now - started)))

        yield advance


def _line(done: int, total: int | None, rate: float) -> str:
    """A line of progress.

    Example:
        >>> _line(12800, 40000, 320.0)
        '12,800 of 40,000 images, 320 images/s, 0:01:25 left'
        >>> _line(1, None, 0.5)
        '1 image, 0.5 images/s'
    """
    if total is None:
        return f"{done:,} {number(done, 'image').partition(' ')[2]}, {rate:.3g} images/s"
    left = timedelta(seconds=round((total - done) / rate))
    return f"{done:,} of {total:,} images, {rate:.3g} images/s, {left} left"
