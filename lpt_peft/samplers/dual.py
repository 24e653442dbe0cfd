"""Batch sampler with an instance-balanced and a class-balanced half."""

from __future__ import annotations

from collections.abc import Iterator

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import ConfigError
from lpt_peft.samplers.checks import Labels
from lpt_peft.samplers.draws import class_balanced, instance_balanced
from lpt_peft.samplers.epoch import EpochSampler


class DualSampler(EpochSampler[list[int]]):
    """Batch sampler whose batches are half instance-balanced and half class-balanced, in this order.

    This is the dual sampling of LPT (Dong et al., ICLR 2023, arXiv 2210.01033): both halves share a forward pass, and
    `lpt_peft.losses.LPTLoss` weights them. Pass the sampler to a DataLoader as `batch_sampler`.

    The instance-balanced half draws every image once before it repeats any. The class-balanced half draws like
    `ClassBalancedSampler`; a run that reaches the end of a batch continues in the next batch.

    With several ranks and `h = batch_size / 2`, rank r takes rows `r * h` to `(r + 1) * h` of both halves of a step:
    instance-balanced halves are disjoint within a pass over the images, class-balanced halves contain different runs.
    Frameworks must not distribute the batches again. Do not pass the loader to Accelerate's `prepare`, or create the
    sampler with `num_replicas=1, rank=0` and let Accelerate distribute its batches. With Lightning, set
    `use_distributed_sampler=False` in the Trainer.

    Mixup and CutMix act on the full batch. timm's `Mixup` mixes row i with row `batch_size - 1 - i`, so it always mixes
    an instance-balanced row with a class-balanced row. torchvision's `MixUp` and `CutMix` mix row i with row `i - 1`,
    which is in the same half except for the first row of each half. To keep the halves separate, mix `images[:h]` and
    `images[h:]` separately. Both return probabilities as targets, which `LPTLoss` accepts.

    Args:
        labels: Class of every image, (N,) integers of at least 0: a list, an array or an integer tensor.
        batch_size: Images per step and rank, an even number: half instance-balanced, half class-balanced.
        samples_per_class: Consecutive images of a class in the class-balanced half; the published runs use 4.
        num_batches: Batches per epoch and rank. None means `N // (h * num_replicas) + 1`, as published: all ranks
            together draw every image at least once, and the remainder of the last batch starts a new pass.
        seed: Integer of at least 0, the same on all ranks.
        num_replicas: Number of ranks. None: the world size of torch.distributed at each use (iteration, length, state),
            or 1 if it is not initialized. The sampler can be created before the process group.
        rank: Rank of this process; required if and only if `num_replicas` is given.

    Raises:
        InputError: The labels are a dataset, empty, negative, not integers, not one-dimensional, or of a single class.
        ConfigError: A setting is out of its range; the message names it.

    Example:
        >>> labels = [0] * 90 + [1] * 9 + [2]
        >>> sampler = DualSampler(labels, batch_size=12)
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
        self._batch_size = checked_integer("batch_size", batch_size, 2)
        if self._batch_size % 2:
            raise ConfigError(
                f"batch_size={batch_size} must be even, because half of a batch is instance-balanced and half "
                f"class-balanced: use {self._batch_size - 1} or {self._batch_size + 1}."
            )
        self._num_batches = None if num_batches is None else checked_integer("num_batches", num_batches, 1)

    def _sizes(self, num_replicas: int) -> dict[str, int]:
        return {"batch_size": self._batch_size, "num_batches": self._length(num_replicas)}

    def _length(self, num_replicas: int) -> int:
        if self._num_batches is not None:
            return self._num_batches
        return len(self._class_of) // (self._batch_size // 2 * num_replicas) + 1

    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[list[int]]:
        half = self._batch_size // 2
        step = half * num_replicas
        key, first = (self._seed, epoch), start * step
        instances = instance_balanced(len(self._class_of), key, first, step)
        classes = class_balanced(self._class_of, self._samples_per_class, key, first, step)
        own = slice(rank * half, (rank + 1) * half)
        for _ in range(start, self._length(num_replicas)):
            yield next(instances)[own].tolist() + next(classes)[own].tolist()
