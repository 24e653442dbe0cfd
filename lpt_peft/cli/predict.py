"""`lpt-peft predict DIR IMAGES...`: the classes that a trained model sees in image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lpt_peft.cli.common.extras import extra_needed
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL import Image

_BATCH = 64


def predict(
    folder: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    top_k: int = 3,
    as_json: Json = False,
) -> None:
    """Name what is in images.

    Args:
        folder: Output folder of `lpt-peft train`, or a prompt file.
        images: Image files.
        top_k: Classes for each image, the likeliest first.
        as_json: Print a JSON list with an object for each image.
    """
    with extra_needed("lpt-peft predict", "train"):
        import torch

        from lpt_peft.cli.common.load_run import open_trained
        from lpt_peft.cli.common.tables import print_table
        from lpt_peft.data.transforms import transforms

    trained = open_trained(folder)
    adapter, names = trained.adapter, trained.class_names
    if not images:
        raise InputError("predict needs images: lpt-peft predict DIR IMAGE ...")
    if not 1 <= top_k <= len(names):
        raise ConfigError(f"--top-k {top_k} must be from 1 to {len(names)}, the number of classes.")
    transform = transforms(adapter.backbone.preprocess(), train=False, crop_pct=trained.images.crop_pct)
    device = adapter.head.weight.device
    found: list[tuple[Path, list[dict[str, Any]]]] = []
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            some = images[start : start + _BATCH]
            batch = torch.stack([transform(_read(path)) for path in some])
            shares, labels = adapter(batch.to(device)).softmax(1).topk(top_k)
            for path, share, label in zip(some, shares.tolist(), labels.tolist(), strict=True):
                pairs = zip(label, share, strict=True)
                found.append((path, [{"class": names[j], "label": j, "probability": p} for j, p in pairs]))
    if as_json:
        told = [{"image": str(path), "classes": classes} for path, classes in found]
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        print_table([(str(path), *map(_cell, classes)) for path, classes in found])


def _read(path: Path) -> Image.Image:
    from lpt_peft.data.files.reading import open_image

    try:
        return open_image(path)
    except Exception as error:  # decoders raise anything at all on broken bytes
        raise InputError(f"{path} cannot be read as an image: {type(error).__name__}: {str(error)[:200]}.") from error


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['class']} {entry['probability']:.1%}"
