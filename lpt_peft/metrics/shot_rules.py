"""Shot rules: thresholds for many-, medium- and few-shot classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lpt_peft.errors import ConfigError
from lpt_peft.metrics.checks import Counts, as_integers

SHOT_NAMES = ("many", "medium", "few")
"""Names of the numbers 0, 1 and 2 of `shot_groups`."""


@dataclass(frozen=True, kw_only=True)
class ShotRule:
    """Numbers `n` of training images for which a class is many-, medium- or few-shot.

    The defaults are those of the published LPT results.

    Args:
        many: Many-shot threshold: `n > many`, or `n >= many` with `many_inclusive`.
        few: Few-shot threshold: `n < few`, or `n <= few` with `few_inclusive`.
        many_inclusive: Whether a class with exactly `many` training images is many-shot.
        few_inclusive: Whether a class with exactly `few` training images is few-shot.

    Raises:
        ConfigError: A threshold is not an integer of at least 0, or a class could be both many- and few-shot.

    Example:
        >>> print(ShotRule())
        many: n > 100, medium: 20 < n <= 100, few: n <= 20
    """

    many: int = 100
    few: int = 20
    many_inclusive: bool = False
    few_inclusive: bool = True

    def __post_init__(self) -> None:
        for name, value in (("many", self.many), ("few", self.few)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(
                    f"{name}={value!r} must be an integer of at least 0; usual values are many=100, few=20."
                )
        first_many, last_few = self.bounds
        if first_many <= last_few:
            raise ConfigError(
                f"many={self.many} and few={self.few} overlap: a class with {first_many} training images would be both "
                f"many- and few-shot. Choose few smaller than many."
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest many-shot and the largest few-shot `n`."""
        return self.many + (not self.many_inclusive), self.few - (not self.few_inclusive)

    def __str__(self) -> str:
        many = f"n >{'=' * self.many_inclusive} {self.many}"
        few = f"n <{'=' * self.few_inclusive} {self.few}"
        medium = f"{self.few} <{'=' * (not self.few_inclusive)} n <{'=' * (not self.many_inclusive)} {self.many}"
        first_many, last_few = self.bounds
        return f"many: {many}, medium: {'none' if last_few + 1 == first_many else medium}, few: {few}"


SHOT_RULES: Mapping[str, ShotRule] = {
    "lpt": ShotRule(),  # > 100, <= 20: published LPT results (Dong et al., ICLR 2023)
    "lift": ShotRule(few_inclusive=False),  # > 100, < 20: LIFT (ICML 2024), decoupling (Kang et al., ICLR 2020)
    "oltr": ShotRule(many_inclusive=True),  # >= 100, <= 20: OLTR (Liu et al., CVPR 2019)
}
"""Published shot rules by name. "lpt" is the default throughout the library."""


def shot_groups(class_counts: Counts, rule: ShotRule = SHOT_RULES["lpt"]) -> Tensor:
    """Assign every class to a shot group, (C,) int64: 0 many-, 1 medium-, 2 few-shot.

    Args:
        class_counts: Training images per class, (C,) integers of at least 0; or a mapping from label to count.
        rule: The thresholds.

    Raises:
        InputError: The counts are empty, negative, not integers or not one-dimensional.

    Example:
        >>> shot_groups([500, 101, 100, 20, 19, 0]).tolist()
        [0, 0, 1, 2, 2, 2]
    """
    counts = as_integers("class_counts", class_counts)
    first_many, last_few = rule.bounds
    return 1 - (counts >= first_many).long() + (counts <= last_few).long()
