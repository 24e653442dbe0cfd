"""CIFAR-10/100-LT from the standard python archives on disk, the accepted split.

torchvision reads the archives and holds their MD5 sums against those of the originals. Not here: which images are kept
(`long_tail.py`) and the download.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.long_tail import Kind, cifar_lt_indices
from lpt_peft.data.sources import ArrayImages
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cifar_lt(
    root: str | os.PathLike[str],
    name: Literal["cifar10", "cifar100"] = "cifar100",
    imbalance: float = 100,
    kind: Kind = "exp",
    *,
    train: bool = True,
    **options: Unpack[Options],
) -> LabelledImages:
    """The long-tailed training part, or the balanced test part.

    Args:
        root: Folder that holds `cifar-10-batches-py` or `cifar-100-python`, the unpacked archive.
        name: "cifar10" or "cifar100" (fine labels).
        imbalance: Largest over smallest count of the training part: 100, 50 or 10 in the literature.
        kind: "exp", or "step": half of the classes whole, half cut.
        train: The training part; False gives all test images.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: A file of the archive is missing, or its bytes are not the original's.
        ConfigError: The name is unknown, or imbalance or kind are none of `exponential_counts`.
    """
    archive = _open(Path(root), name, train)
    pixels, labels = archive.data, archive.targets
    if train:
        kept = cifar_lt_indices(labels, imbalance, kind)
        pixels, labels = pixels[kept], [labels[index] for index in kept]
    part = "training" if train else "test"
    return LabelledImages(ArrayImages(pixels, f"the {part} part of {name}"), labels, archive.classes, **options)


def _open(root: Path, name: str, train: bool) -> Any:
    """The dataset of torchvision, or an error that says what is wrong with the files."""
    from torchvision.datasets import CIFAR10, CIFAR100  # noqa: PLC0415 - where used

    if name not in ("cifar10", "cifar100"):
        raise ConfigError(f'name={name!r} must be "cifar10" or "cifar100".')
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        return kind(root, train=train, download=False)
    except RuntimeError as error:  # "not found or corrupted", for either
        folder = root / kind.base_folder
        files = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
        missing = [file for file in files if not (folder / file).is_file()]
        if not missing:
            raise InputError(
                f"The files in {folder} are not the original ones: an MD5 sum differs. Fetch {kind.url} anew and "
                "unpack it."
            ) from error
        cure = f"Fetch {kind.url} and unpack it in {root}"
        if (root / kind.filename).is_file():
            cure = f"Unpack {root / kind.filename} there"
        raise InputError(f"root={str(root)!r} lacks {kind.base_folder}/ with {', '.join(missing)}. {cure}.") from error
