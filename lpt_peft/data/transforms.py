"""Training and evaluation transforms from the data configuration of a backbone.

A wrong mean or std silently lowers accuracy, so there are no default values here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lpt_peft.errors import ConfigError

if TYPE_CHECKING:  # the command line reads RECIPE_CROP_PCT without Pillow
    from lpt_peft.data.files.reading import Color, Reading

RECIPE_CROP_PCT = 224 / 256
"""The evaluation of the LPT paper: resize the shorter side to 256 and crop the central 224."""


CROPS = 5
"""Crops of an image in an evaluation with several crops."""
_EXPANSION = 24 / 224


class ImageTransform:
    """Transform from an image to a tensor; starts with the conversion to RGB.

    Args:
        reading: Orientation and background. `LabelledImages` reads images with it.
        steps: Functions that are applied to the RGB image in their order.

    Attributes:
        reading: Orientation and background.
        transforms: The functions.
    """

    def __init__(self, reading: Reading, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.reading = reading
        self.transforms = list(steps)

    def __call__(self, image: Any) -> Any:
        """Transform a PIL image of any mode, or an object that the first function accepts."""
        image = self.reading(image)
        for step in self.transforms:
            image = step(image)
        return image

    def __repr__(self) -> str:
        return f"ImageTransform({self.reading}, {self.transforms})"


def transforms(
    preprocess: Mapping[str, Any],
    train: bool,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    crop_pct: float | None = None,
    exif: bool | None = None,
    background: Color | None = None,
    crops: int = 1,
) -> ImageTransform:
    """Build a transform from a PIL image of any mode to a tensor (C, H, W) float32, or (5, C, H, W) for five crops.

    Training applies torchvision's RandomResizedCrop and a random horizontal flip, which draw from torch's default
    generator, so that seeded and resumed runs repeat; the crop of timm draws from Python's `random`. Evaluation is
    `timm.data.create_transform`: by default resize to `floor(size / crop_pct)`, then a centre crop. Five crops are the
    centre and the corners of the image resized to `size + round(size * 24 / 224)`, the test-time ensemble of LIFT (Shi
    et al., ICML 2024): 24 pixels are not a multiple of the patch size, so that patches differ between the crops.

    Args:
        preprocess: `adapter.preprocess()`, or `preprocess` of a prompt file.
        train: Training transform; False builds the evaluation transform.
        scale: Smallest and largest share of the image area that a training crop covers.
        ratio: Smallest and largest width over height of a training crop.
        flip: Probability of a horizontal flip; use 0 where left and right differ in meaning, as in digits.
        crop_pct: Replaces the value of `preprocess` in the evaluation: `RECIPE_CROP_PCT` for the 256 and 224 of the
            paper, 1 to keep the border.
        exif: Follow the EXIF orientation; None uses `exif` of `preprocess`, or True if it is missing.
        background: RGB colour behind transparent pixels; None uses `background` of `preprocess`, or white.
        crops: Crops of an image in the evaluation: 1, or 5, for which `crop_pct` is not used; see
            `lpt_peft.recipe.evaluate`.

    Raises:
        ConfigError: The configuration has a missing key or is not for RGB images, or a setting is out of range.

    Example:
        >>> from PIL import Image
        >>> preprocess = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
        ...               "crop_pct": 0.9, "crop_mode": "center"}
        >>> transforms(preprocess, train=False)(Image.new("RGB", (50, 40))).shape
        torch.Size([3, 32, 32])
    """
    from timm.data import create_transform  # noqa: PLC0415 - imported on use
    from timm.data.transforms import str_to_interp_mode  # noqa: PLC0415
    from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop  # noqa: PLC0415

    from lpt_peft.data.files.reading import Reading  # noqa: PLC0415

    given = {"exif": exif, "background": background}
    reading = Reading.from_preprocess(
        {**preprocess, **{key: value for key, value in given.items() if value is not None}}
    )
    config = _checked(preprocess, scale, ratio, flip, crop_pct)
    evaluation = create_transform(**config, is_training=False)
    if crops != 1:
        return ImageTransform(reading, _five_crops(config, crops, train))
    if not train:
        return ImageTransform(reading, evaluation.transforms)
    interpolation = str_to_interp_mode(config["interpolation"])
    crop = RandomResizedCrop(config["input_size"][1:], scale, ratio, interpolation, antialias=True)
    to_tensor, normalize = evaluation.transforms[-2:]
    return ImageTransform(reading, [crop, RandomHorizontalFlip(flip), to_tensor, normalize])


class _Stack:
    """Converts the crops of `FiveCrop` to a tensor (5, C, H, W) that begins with the centre; picklable for workers."""

    def __init__(self, *steps: Callable[[Any], Any]) -> None:
        self._steps = steps

    def __call__(self, images: Sequence[Any]) -> Any:
        import torch  # noqa: PLC0415 - imported on use

        *corners, centre = images
        tensors = []
        for image in (centre, *corners):
            for step in self._steps:
                image = step(image)  # noqa: PLW2901
            tensors.append(image)
        return torch.stack(tensors)


def _five_crops(config: dict[str, Any], crops: int, train: bool) -> list[Callable[[Any], Any]]:
    """Resize, crop, convert and stack; the centre is the first crop."""
    from timm.data import create_transform  # noqa: PLC0415 - imported on use
    from torchvision.transforms import FiveCrop  # noqa: PLC0415

    if crops != CROPS or train or config["crop_mode"] == "border":
        raise ConfigError(
            f"crops={crops} must be 1 or {CROPS}, and {CROPS} only for an evaluation (train=False) with crop_mode "
            f'"center" or "squash", not "{config["crop_mode"]}".'
        )
    size = config["input_size"][1:]
    larger = size[0] + max(1, round(size[0] * _EXPANSION))
    crop_pct = size[0] / (larger + 0.5)  # timm rounds size / crop_pct down
    evaluation = create_transform(**{**config, "crop_pct": crop_pct}, is_training=False)
    *resize, _, to_tensor, normalize = evaluation.transforms
    return [*resize, FiveCrop(size), _Stack(to_tensor, normalize)]


def _checked(
    preprocess: Mapping[str, Any],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    crop_pct: float | None,
) -> dict[str, Any]:
    """Validate the settings; return the arguments of `create_transform`."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    if missing := [key for key in keys if key not in preprocess]:
        raise ConfigError(f"preprocess has no {missing}; pass adapter.preprocess().")
    config: dict[str, Any] = {key: preprocess[key] for key in keys}
    config |= {key: tuple(config[key]) for key in ("input_size", "mean", "std")}
    if config["input_size"][0] != 3 or len(config["mean"]) != 3 or len(config["std"]) != 3:
        raise ConfigError(
            f"preprocess has input_size={list(config['input_size'])} and {len(config['mean'])} means, but images are "
            "read as RGB, 3 channels. Build the backbone with in_chans=3, or use another transform."
        )
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    check_crops(scale, ratio, flip, config["crop_pct"])
    return config


def check_crops(
    scale: tuple[float, float], ratio: tuple[float, float], flip: float, crop_pct: float | None = None
) -> None:
    """Check the ranges of the settings of `transforms`; a `crop_pct` of None is that of the backbone.

    Raises:
        ConfigError: A setting is out of range.
    """
    checks = {
        f"scale={scale}": (
            0 < scale[0] <= scale[1] <= 1,
            "two shares of the area, above 0 and up to 1, the smaller first",
        ),
        f"ratio={ratio}": (
            0 < ratio[0] <= ratio[1] < float("inf"),
            "two values of width over height, above 0, the smaller first",
        ),
        f"flip={flip}": (0 <= flip <= 1, "a probability from 0 to 1"),
        f"crop_pct={crop_pct}": (crop_pct is None or 0.05 <= crop_pct <= 1, "from 0.05 to 1"),
    }
    if broken := [f"{name} must be {rule}" for name, (valid, rule) in checks.items() if not valid]:
        raise ConfigError(f"transforms: {'; '.join(broken)}.")
