"""DualSampler: an instance-balanced and a class-balanced half in every batch."""

from __future__ import annotations

from collections.abc import Iterator

from lpt_peft.errors import ConfigError
from lpt_peft.samplers.checks import Labels, whole
from lpt_peft.samplers.draws import class_balanced, instance_balanced
from lpt_peft.samplers.epoch import EpochSampler


class DualSampler(EpochSampler[list[int]]):
    """Batches of `batch_size` indices: an instance-balanced half, then a class-balanced half.

    Dual sampling of LPT (Dong et al., ICLR 2023, arXiv 2210.01033): both halves share one forward pass, and
    `lpt_peft.losses.LPTLoss` weighs them. Pass it to a DataLoader as `batch_sampler`.
    The instance-balanced half takes every image once before any comes again. The class-balanced half draws like
    `ClassBalancedSampler`; a run cut by the end of a batch continues in the next batch.

    With several ranks, rank r takes rows `r * h` to `(r + 1) * h` of both halves of a step, `h = batch_size / 2`:
    instance-balanced halves are disjoint within a pass over the images, class-balanced ones take different runs.
    Frameworks would share out the batches once more: with several processes keep the loader out of Accelerate's
    `prepare`, or make the sampler with `num_replicas=1, rank=0` and let Accelerate deal out its batches; give
    Lightning's Trainer `use_distributed_sampler=False`.

    Mixup and CutMix see the whole batch. timm's `Mixup` mixes row i with row `batch_size - 1 - i`, so an
    instance-balanced row always with a class-balanced one; torchvision's `MixUp` and `CutMix` mix row i with row
    `i - 1`, so within a half except for its first row. Mix `images[:h]` and `images[h:]` separately to keep the halves
    apart. Both return soft targets, which `LPTLoss` refuses.

    Args:
        labels: Class of every image, (N,) integers of at least 0: a list, an array or an integer tensor.
        batch_size: Images of a step on one rank, an even number: half instance-balanced, half class-balanced.
        samples_per_class: Images of a class in a row in the class-balanced half; the published runs use 4.
        num_batches: Batches per epoch and rank. None means `N // (h * num_replicas) + 1`, as published: every image at
            least once over all ranks; what is left of the last batch begins a new pass.
        seed: Integer of at least 0, the same on all ranks.
        num_replicas: Number of ranks. None: that of torch.distributed at each use (iteration, length, state), and 1
            while it is not initialised, so the sampler may be made before the process group.
        rank: This rank; given exactly if `num_replicas` is.

    Raises:
        InputError: The labels are empty, negative, not integers, not one-dimensional, of one class, or a dataset.
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
        self._batch_size = whole("batch_size", batch_size, 2)
        if self._batch_size % 2:
            raise ConfigError(
                f"batch_size={batch_size} must be even, as half of a batch is instance-balanced and half "
                f"class-balanced: use {self._batch_size - 1} or {self._batch_size + 1}."
            )
        self._num_batches = None if num_batches is None else whole("num_batches", num_batches, 1)

    def _sizes(self, num_replicas: int) -> dict[str, int]:
        return {"batch_size": self._batch_size, "num_batches": self._length(num_replicas)}

    def _length(self, num_replicas: int) -> int:
        if self._num_batches is not None:
            return self._num_batches
        return len(self._class_of) // (self._batch_size // 2 * num_replicas) + 1

    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[list[int]]:
        half = self._batch_size // 2
        step = half * num_replicas
        place = ((self._seed, epoch), start * step, step)
        instances = instance_balanced(len(self._class_of), *place)
        classes = class_balanced(self._class_of, self._samples_per_class, *place)
        own = slice(rank * half, (rank + 1) * half)
        for _ in range(start, self._length(num_replicas)):
            yield next(instances)[own].tolist() + next(classes)[own].tolist()
