"""ClassBalancedSampler: every class equally often."""

from __future__ import annotations

from collections.abc import Iterator

from lpt_peft.samplers.checks import Labels, whole
from lpt_peft.samplers.draws import BLOCK_ROWS, class_balanced
from lpt_peft.samplers.epoch import EpochSampler


class ClassBalancedSampler(EpochSampler[int]):
    """Indices in which every class is equally frequent, however many images it has.

    The classes come in shuffled cycles; at its turn a class gives a run of `samples_per_class` images. Within a run no
    image comes twice unless the class is smaller than that, and then each comes equally often, give or take one.
    The images of one run do not depend on another's: the draw is with replacement. Classes are the distinct labels;
    numbers that no label has are skipped. LPT (Dong et al., ICLR 2023, arXiv 2210.01033) takes 4 of a class at a time.

    With several ranks the runs are dealt out in turn, one to each, so the ranks draw different runs of the same cycles.
    The draw is the same for any number of ranks: together they draw what one process would.

    Args:
        labels: Class of every image, (N,) integers of at least 0: a list, an array or an integer tensor.
        num_samples: Indices per epoch of all ranks together; None means N. A rank yields `len(self)`, this divided by
            `num_replicas` and rounded up, and its last run may be cut short.
        samples_per_class: Images of a class in a row.
        seed: Integer of at least 0, the same on all ranks.
        num_replicas: Number of ranks. None: that of torch.distributed at each use (iteration, length, state), and 1
            while it is not initialised, so the sampler may be made before the process group.
        rank: This rank; given exactly if `num_replicas` is.

    Raises:
        InputError: The labels are empty, negative, not integers, not one-dimensional, of one class, or a dataset.
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
        self._num_samples = len(self._class_of) if num_samples is None else whole("num_samples", num_samples, 1)

    def _sizes(self, num_replicas: int) -> dict[str, int]:
        return {"num_samples": self._num_samples}

    def _length(self, num_replicas: int) -> int:
        return -(-self._num_samples // num_replicas)

    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[int]:
        run = self._samples_per_class
        deal = run * num_replicas  # rows of one run for every rank
        deals = max(1, BLOCK_ROWS // deal)
        skip = start % run
        left = self._length(num_replicas) - start
        for rows in class_balanced(self._class_of, run, (self._seed, epoch), start // run * deal, deals * deal):
            own = rows.reshape(deals, num_replicas, run)[:, rank].ravel()[skip:][:left]
            yield from own.tolist()
            left, skip = left - len(own), 0
            if left == 0:
                return
