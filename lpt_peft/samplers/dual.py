"""DualSampler: an instance-balanced and a class-balanced half in every batch."""

from __future__ import annotations

from collections.abc import Iterator

from lpt_peft.samplers.checks import Labels, whole
from lpt_peft.samplers.draws import class_balanced, instance_balanced
from lpt_peft.samplers.epoch import EpochSampler


class DualSampler(EpochSampler[list[int]]):
    """Batches of `2 * batch_size` indices: an instance-balanced half, then a class-balanced half.

    Dual sampling of LPT (Dong et al., ICLR 2023, arXiv 2210.01033): both halves share one forward pass, and
    `lpt_peft.losses.LPTLoss` weighs them. Pass it to a DataLoader as `batch_sampler`.
    The instance-balanced half takes every image once before any comes again. The class-balanced half draws like
    `ClassBalancedSampler`; a run cut by the end of a batch goes on with the next rows.

    With several ranks, rank r takes rows `r * batch_size` to `(r + 1) * batch_size` of a step's rows, in both halves:
    instance-balanced halves are disjoint within a pass over the images, class-balanced ones take different runs.
    Frameworks would share out the batches once more: with several processes keep the loader out of Accelerate's
    `prepare`, and give Lightning's Trainer `use_distributed_sampler=False`.

    Args:
        labels: Class of every image, (N,) whole numbers of at least 0: a list, an array or an integer tensor.
        batch_size: Images of each half, per rank.
        samples_per_class: Images of a class in a row in the class-balanced half; the published runs use 4.
        num_batches: Batches per epoch and rank. None means `N // (batch_size * num_replicas) + 1`, as published: every
            image at least once over all ranks; what is left of the last batch begins a new pass.
        seed: Whole number of at least 0, the same on all ranks.
        num_replicas: Number of ranks. None: from torch.distributed if it is initialised by now, else 1.
        rank: This rank; given exactly if `num_replicas` is.

    Raises:
        InputError: The labels are empty, negative, not whole, not one-dimensional, of one class, or a dataset.
        ConfigError: A setting is out of its range; the message names it.

    Example:
        >>> labels = [0] * 90 + [1] * 9 + [2]
        >>> sampler = DualSampler(labels, batch_size=6)
        >>> instance_balanced, class_balanced = zip(*((batch[:6], batch[6:]) for batch in sampler))
        >>> len(sampler), len(set(sum(instance_balanced, [])))
        (17, 100)
        >>> sorted(labels[index] for index in class_balanced[0])
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int,
        *,
        samples_per_class: int = 1,
        num_batches: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(labels, samples_per_class, seed, num_replicas, rank)
        self._batch_size = whole("batch_size", batch_size, 1)
        default = len(self._class_of) // (self._batch_size * self._num_replicas) + 1
        self._length = default if num_batches is None else whole("num_batches", num_batches, 1)
        self._settings |= {"batch_size": self._batch_size, "num_batches": self._length}

    def _draw(self, epoch: int, start: int) -> Iterator[list[int]]:
        step = self._batch_size * self._num_replicas
        place = ((self._seed, epoch), start * step, step)
        instances = instance_balanced(len(self._class_of), *place)
        classes = class_balanced(self._class_of, self._samples_per_class, *place)
        mine = slice(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)
        for _ in range(start, self._length):
            yield next(instances)[mine].tolist() + next(classes)[mine].tolist()
