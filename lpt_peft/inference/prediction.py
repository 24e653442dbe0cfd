"""Prediction: the most probable classes of an image, or the reason why it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lpt_peft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Classes of an image, the most probable first.

    Attributes:
        image: Path of the image as given; "image 3" for the image at position 3 that has no path.
        labels: Classes, integers from 0 to `C - 1`.
        label_names: Their names.
        probabilities: Their calibrated probabilities, from 0 to 1, in descending order.
        groups: Groups of prompts that the image selected; empty for a model without groups.
        error: Reason why the image cannot be read; None if it was read. With an error, the classes are empty.

    Example:
        >>> found = Prediction(image="a.jpg", labels=(3, 0), label_names=("owl", "ant"), probabilities=(0.9, 0.1))
        >>> found.label_name, found.probability
        ('owl', 0.9)
        >>> Prediction(image="b.jpg", error="the file is empty").label
        Traceback (most recent call last):
        lpt_peft.errors.InputError: b.jpg has no prediction, because it cannot be read: the file is empty. ...
    """

    image: str
    labels: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    groups: tuple[int, ...] = ()
    error: str | None = None

    @property
    def label(self) -> int:
        """The most probable class.

        Raises:
            InputError: The image cannot be read.
        """
        self._check_readable()
        return self.labels[0]

    @property
    def label_name(self) -> str:
        """Name of the most probable class.

        Raises:
            InputError: The image cannot be read.
        """
        self._check_readable()
        return self.label_names[0]

    @property
    def probability(self) -> float:
        """Probability of the most probable class.

        Raises:
            InputError: The image cannot be read.
        """
        self._check_readable()
        return self.probabilities[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: "image" with "classes", each of "class", "label" and "probability"; or with "error".

        Example:
            >>> Prediction(image="a.jpg", labels=(3,), label_names=("owl",), probabilities=(0.9,)).to_dict()
            {'image': 'a.jpg', 'classes': [{'class': 'owl', 'label': 3, 'probability': 0.9}]}
        """
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        entries = zip(self.label_names, self.labels, self.probabilities, strict=True)
        return {"image": self.image, "classes": [{"class": n, "label": c, "probability": p} for n, c, p in entries]}

    def _check_readable(self) -> None:
        if self.error is not None:
            raise InputError(
                f"{self.image} has no prediction, because it cannot be read: {self.error}. Check `error` first, or "
                "repair the image."
            )
