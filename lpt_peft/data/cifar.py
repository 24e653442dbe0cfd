"""CIFAR-10/100-LT from the standard Python archives on disk.

torchvision reads the archives and verifies their MD5 sums. Not here: the long-tailed subset (`long_tail.py`) and the
download.
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
    """Open the long-tailed training split or the balanced test split.

    Args:
        root: Folder with the unpacked archive, `cifar-10-batches-py` or `cifar-100-python`.
        name: "cifar10" or "cifar100" (fine labels).
        imbalance: Largest over smallest class count of the training split: 100, 50 or 10 in the literature.
        kind: "exp", or "step", which keeps half of the classes complete and reduces the others.
        train: The training split; False opens all test images.
        **options: Options of `LabelledImages`.

    Raises:
        InputError: A file of the archive is missing or differs from the original.
        ConfigError: The name or the kind is unknown, or the imbalance is out of range.
    """
    archive = _open(Path(root), name, train)
    pixels, labels = archive.data, archive.targets
    if train:
        kept = cifar_lt_indices(labels, imbalance, kind)
        pixels, labels = pixels[kept], [labels[index] for index in kept]
    split = "training" if train else "test"
    return LabelledImages(ArrayImages(pixels, f"the {split} split of {name}"), labels, archive.classes, **options)


def _open(root: Path, name: str, train: bool) -> Any:
    """Open the dataset of torchvision; the error names the missing or changed files."""
    from torchvision.datasets import CIFAR10, CIFAR100  # noqa: PLC0415 - imported on use

    if name not in ("cifar10", "cifar100"):
        raise ConfigError(f'name={name!r} must be "cifar10" or "cifar100".')
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        return kind(root, train=train, download=False)
    except RuntimeError as error:  # the same error for missing and for changed files
        folder = root / kind.base_folder
        files = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
        missing = [file for file in files if not (folder / file).is_file()]
        if not missing:
            raise InputError(
                f"The files in {folder} differ from the original archive (MD5). Download {kind.url} again and "
                "unpack it."
            ) from error
        cure = f"Download {kind.url} and unpack it in {root}"
        if (root / kind.filename).is_file():
            cure = f"Unpack {root / kind.filename} there"
        raise InputError(f"root={str(root)!r} lacks {kind.base_folder}/ with {', '.join(missing)}. {cure}.") from error
