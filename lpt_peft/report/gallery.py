"""Thumbnails of the mistakes that a model is surest of."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from lpt_peft.data.files.reading import without_pillow_warnings
from lpt_peft.data.images import LabelledImages
from lpt_peft.recipe.predictions import Predictions, image_names
from lpt_peft.report.classes import clip, percent

THUMBNAILS = 48
_SIDE, _QUALITY = 96, 80
_ATTEMPTS = 4 * THUMBNAILS


class Thumbnail(NamedTuple):
    """A mistake."""

    picture: str
    """Data URI of a JPEG."""
    target: str
    prediction: str
    probability: str
    image: str
    """Name of the image."""


class Gallery(NamedTuple):
    """The surest mistakes."""

    thumbnails: list[Thumbnail]
    mistakes: int
    """All mistakes of the split."""
    unreadable: int
    """Images that were skipped because they cannot be read."""


def gallery(predictions: Predictions, images: LabelledImages, classes: Mapping[str, Any]) -> Gallery | str:
    """Select the mistakes with the highest probability of the predicted class.

    Args:
        predictions: On the split of the images.
        images: The split, in the same order.
        classes: Section of an analysis.

    Returns:
        The gallery, or the reason why there is none.
    """
    if reason := _mismatch(predictions, images):
        return reason
    wrong = (~predictions.correct).nonzero().flatten()
    order = wrong[predictions.probability[wrong].argsort(descending=True, stable=True)].tolist()
    names = classes["name"]
    found: list[Thumbnail] = []
    unreadable = 0
    for row in order[:_ATTEMPTS]:
        if len(found) == THUMBNAILS:
            break
        position = row if predictions.position is None else int(predictions.position[row])
        try:
            with without_pillow_warnings():
                picture = _thumbnail(images, position)
        except MemoryError:
            raise
        except Exception:
            unreadable += 1
            continue
        found.append(
            Thumbnail(
                picture,
                clip(names[int(predictions.target[row])]),
                clip(names[int(predictions.prediction[row])]),
                percent(float(predictions.probability[row])),
                clip(images.images.name(position), 200),
            )
        )
    return Gallery(found, len(order), unreadable)


def _mismatch(predictions: Predictions, images: LabelledImages) -> str | None:
    """Why the predictions are not of these images."""
    labels = torch.tensor(images.labels)
    if predictions.position is not None:
        labels = labels[predictions.position[predictions.position < len(labels)]]
    named = image_names(images)
    same = torch.equal(labels, predictions.target) and (predictions.images is None or predictions.images == named)
    if same:
        return None
    return "The stored predictions are of other images than those that were opened: name the images of the run as DATA."


def _thumbnail(images: LabelledImages, position: int) -> str:
    """A data URI of an image, at most 96 pixels wide and high; small images are enlarged without smoothing."""
    image: Any = images.reading(images.images.read(position))
    if not isinstance(image, Image.Image):
        tensor = torch.as_tensor(image).float()
        low, high = tensor.min(), tensor.max()  # a normalized image: its range becomes black to white
        image = to_pil_image((tensor - low) / (high - low).clamp(min=1e-6))
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    filter = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    content = BytesIO()
    image.convert("RGB").resize(size, filter).save(content, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
