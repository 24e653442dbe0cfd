"""From image to what a backbone was trained on: size, mean, std and interpolation of its own data configuration.

Wrong mean and std cost points silently, so nothing here has a default of its own for them. Evaluation is timm's;
training is LPT's recipe, random crop and flip. Not here: other augmentation; compose your own behind or instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpt_peft.errors import ConfigError

RECIPE_CROP_PCT = 224 / 256
"""LPT's evaluation: resize the shorter side to 256, crop 224 in the centre."""


def transforms(
    preprocess: Mapping[str, Any],
    train: bool,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    crop_pct: float | None = None,
) -> Any:
    """A function of a PIL image, RGB, to a tensor (C, H, W) float32.

    Training: torchvision's RandomResizedCrop, then a horizontal flip. They draw from torch's default generator, so
    seeds and resumed runs hold; timm's own crop would draw from Python's `random`. Evaluation:
    `timm.data.create_transform`, by default resize to `floor(size / crop_pct)` and centre crop.

    Args:
        preprocess: `adapter.backbone.preprocess()`, or `preprocess` of a prompt file's config.json.
        train: Random crop and flip, or the evaluation.
        scale: Least and largest share of the image's area that a training crop covers.
        ratio: Least and largest width over height of a training crop.
        flip: Probability of a horizontal flip; 0 where left and right mean something, as in digits.
        crop_pct: Instead of the configuration's, in the evaluation: `RECIPE_CROP_PCT` for LPT's 256 and 224, 1 to lose
            no border.

    Raises:
        ConfigError: The configuration lacks a key or is not for RGB images, or a setting is out of its range.

    Example:
        >>> from PIL import Image
        >>> preprocess = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
        ...               "crop_pct": 0.9, "crop_mode": "center"}
        >>> transforms(preprocess, train=False)(Image.new("RGB", (50, 40))).shape
        torch.Size([3, 32, 32])
    """
    from timm.data import create_transform  # noqa: PLC0415 - where used
    from timm.data.transforms import str_to_interp_mode  # noqa: PLC0415
    from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop  # noqa: PLC0415

    config = _checked(preprocess, scale, ratio, flip, crop_pct)
    evaluation = create_transform(**config, is_training=False)
    if not train:
        return evaluation
    interpolation = str_to_interp_mode(config["interpolation"])
    crop = RandomResizedCrop(config["input_size"][1:], scale, ratio, interpolation, antialias=True)
    to_tensor, normalize = evaluation.transforms[-2:]
    return Compose([crop, RandomHorizontalFlip(flip), to_tensor, normalize])


def _checked(
    preprocess: Mapping[str, Any],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    crop_pct: float | None,
) -> dict[str, Any]:
    """The configuration as `create_transform` takes it."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    if missing := [key for key in keys if key not in preprocess]:
        raise ConfigError(f"preprocess lacks {missing}; pass adapter.backbone.preprocess().")
    config: dict[str, Any] = {key: preprocess[key] for key in keys}
    config |= {key: tuple(config[key]) for key in ("input_size", "mean", "std")}
    if config["input_size"][0] != 3 or len(config["mean"]) != 3 or len(config["std"]) != 3:
        raise ConfigError(
            f"preprocess is for input_size={list(config['input_size'])} with {len(config['mean'])} means; images are "
            "read as RGB, 3 channels. Build the backbone with in_chans=3, or write a transform of your own."
        )
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    checks = {
        f"scale={scale}": (
            0 < scale[0] <= scale[1] <= 1,
            "two shares of the area, above 0 and up to 1, the least first",
        ),
        f"ratio={ratio}": (0 < ratio[0] <= ratio[1], "two of width over height, above 0, the least first"),
        f"flip={flip}": (0 <= flip <= 1, "a probability from 0 to 1"),
        f"crop_pct={config['crop_pct']}": (0.05 <= config["crop_pct"] <= 1, "from 0.05 to 1"),
    }
    if broken := [f"{name} must be {rule}" for name, (fine, rule) in checks.items() if not fine]:
        raise ConfigError(f"transforms: {'; '.join(broken)}.")
    return config
