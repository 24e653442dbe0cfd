"""Shot rules: how many training images make a class many-, medium- or few-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lpt_peft.errors import ConfigError
from lpt_peft.metrics.checks import as_integers


@dataclass(frozen=True, kw_only=True)
class ShotRule:
    """Which numbers `n` of training images make a class many-, medium- or few-shot.

    Args:
        many: Classes with more training images are many-shot; with `many_inclusive` those with as many, too.
        few: Classes with fewer training images are few-shot; with `few_inclusive` those with as many, too.
        many_inclusive: `n >= many` instead of `n > many`.
        few_inclusive: `n <= few` instead of `n < few`.

    Raises:
        ConfigError: A threshold is no whole number of at least 0, or some class would be both many- and few-shot.

    Example:
        >>> print(ShotRule(few_inclusive=True))
        many: n > 100, medium: 20 < n <= 100, few: n <= 20
    """

    many: int = 100
    few: int = 20
    many_inclusive: bool = False
    few_inclusive: bool = False

    def __post_init__(self) -> None:
        for name, value in (("many", self.many), ("few", self.few)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 0; usual are many=100, few=20.")
        first_many, last_few = self.bounds
        if first_many <= last_few:
            raise ConfigError(
                f"many={self.many} and few={self.few} overlap: a class of {first_many} training images would be both "
                f"many- and few-shot. Choose few below many."
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
    "lift": ShotRule(),  # LIFT (Shi et al., ICML 2024) and decoupling (Kang et al., ICLR 2020): > 100, < 20
    "oltr": ShotRule(many_inclusive=True, few_inclusive=True),  # OLTR (Liu et al., CVPR 2019): >= 100, <= 20
    "lpt": ShotRule(few_inclusive=True),  # LPT's published figures (Dong et al., ICLR 2023): > 100, <= 20
}


def shot_groups(class_counts: Tensor | Sequence[int], rule: ShotRule = SHOT_RULES["lift"]) -> Tensor:
    """Shot group of every class, (C,) int64: 0 many-, 1 medium-, 2 few-shot.

    Args:
        class_counts: Training images per class, (C,) integers of at least 0.
        rule: The thresholds.

    Raises:
        InputError: The counts are empty, negative, not integers or not one-dimensional.

    Example:
        >>> shot_groups([500, 101, 100, 20, 19, 0]).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    counts = as_integers("class_counts", class_counts)
    first_many, last_few = rule.bounds
    return 1 - (counts >= first_many).long() + (counts <= last_few).long()
