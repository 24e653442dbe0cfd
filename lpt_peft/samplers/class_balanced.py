"""Sampler that draws all classes equally often."""

from __future__ import annotations

from collections.abc import Iterator

from lpt_peft._numbers import checked_integer
from lpt_peft.samplers.checks import Labels
from lpt_peft.samplers.draws import BLOCK_ROWS, class_balanced
from lpt_peft.samplers.epoch import EpochSampler


class ClassBalancedSampler(EpochSampler[int]):
    """Sampler of indices in which all classes are equally frequent, regardless of their numbers of images.

    The classes are visited in shuffled cycles. Each visit yields a run of `samples_per_class` consecutive indices of
    the class. A run contains no image twice unless the class has fewer images; then the numbers of repetitions differ
    by at most 1. Runs are drawn independently, with replacement between runs. The classes are the distinct labels;
    unused label values are skipped. LPT (Dong et al., ICLR 2023, arXiv 2210.01033) uses runs of 4 images.

    With several ranks, the runs are assigned to the ranks in turn. The draw does not depend on the number of ranks:
    all ranks together draw the indices that a single process would draw.

    Args:
        labels: Class of every image, (N,) integers of at least 0: a list, an array or an integer tensor.
        num_samples: Indices per epoch over all ranks; None means N. Each rank yields `num_samples / num_replicas`
            indices, rounded up, so its last run may be incomplete.
        samples_per_class: Consecutive images of a class.
        seed: Integer of at least 0, the same on all ranks.
        num_replicas: Number of ranks. None: the world size of torch.distributed at each use (iteration, length, state),
            or 1 if it is not initialized. The sampler can be created before the process group.
        rank: Rank of this process; required if and only if `num_replicas` is given.

    Raises:
        InputError: The labels are a dataset, empty, negative, not integers, not one-dimensional, or of a single class.
        ConfigError: A setting is out of its range; the message names it.

    Example:
        >>> labels = [0] * 90 + [1] * 9 + [2]
        >>> sampler = ClassBalancedSampler(labels, num_samples=300)
        >>> [sum(labels[index] == label for index in sampler) for label in range(3)]
        [100, 100, 100]
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        *,
        samples_per_class: int = 1,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(labels, samples_per_class, seed, num_replicas, rank)
        self._num_samples = (
            len(self._class_of) if num_samples is None else checked_integer("num_samples", num_samples, 1)
        )

    def _sizes(self, num_replicas: int) -> dict[str, int]:
        return {"num_samples": self._num_samples}

    def _length(self, num_replicas: int) -> int:
        return -(-self._num_samples // num_replicas)

    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[int]:
        run = self._samples_per_class
        round_size = run * num_replicas  # indices in a round, in which every rank gets a run
        rounds = max(1, BLOCK_ROWS // round_size)
        skip = start % run
        left = self._length(num_replicas) - start
        key, first = (self._seed, epoch), start // run * round_size
        for rows in class_balanced(self._class_of, run, key, first, rounds * round_size):
            own = rows.reshape(rounds, num_replicas, run)[:, rank].ravel()[skip:][:left]
            yield from own.tolist()
            left, skip = left - len(own), 0
            if left == 0:
                return
