"""Predictions of an evaluation: recorded, written to `predictions.safetensors`, and read.

For each split, in its order, without images that cannot be read:

    {split}.target        (N,) int64    true class
    {split}.prediction    (N,) int64    predicted class
    {split}.probability   (N,) float32  softmax probability of the predicted class
    {split}.groups        (N, k) int64  selected groups; only of a model with groups
    {split}.position      (N,) int64    position in the split; only if images were left out

The metadata holds checksums of the image names, which distinguish splits with equal labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lpt_peft._files import write_atomic
from lpt_peft._json import dumps, loads
from lpt_peft._numerics import at_least_float32
from lpt_peft.errors import InputError, StateError
from lpt_peft.metrics.accumulator import predict_labels

PREDICTIONS = "predictions.safetensors"
_ABOUT = "lpt_peft"
_NAME = re.compile(r"(train|validation|test)\.(target|prediction|probability|groups|position)")
_REQUIRED = ("target", "prediction", "probability")


class Predictions(NamedTuple):
    """Predictions on a split, in its order."""

    target: Tensor
    """(N,) int64 true classes."""
    prediction: Tensor
    """(N,) int64 predicted classes."""
    probability: Tensor
    """(N,) float32 softmax probability of the predicted class."""
    groups: Tensor | None = None
    """(N, k) int64 selected groups; None for a model without groups."""
    position: Tensor | None = None
    """(N,) int64 position of each image in the split; None if no image was left out."""
    images: str | None = None
    """Checksums of the image names of the complete split; None if the dataset has no names."""

    @property
    def correct(self) -> Tensor:
        """(N,) bool, whether the prediction is right."""
        return self.prediction == self.target


class PredictionRecorder:
    """Collects predictions batch by batch, on the model's device, without waiting for it.

    Args:
        logits_every: Also keep the logits of every n-th image of a process; None keeps none.

    Attributes:
        result: Predictions of the last complete evaluation; None before.
        logits: Kept logits (n, C) of that evaluation on the CPU, of all processes, and their true classes (n,); None if
            none are kept.
    """

    def __init__(self, *, logits_every: int | None = None) -> None:
        self.result: Predictions | None = None
        self.logits: tuple[Tensor, Tensor] | None = None
        self._every, self._seen = logits_every, 0
        self._batches: list[tuple[Tensor, ...]] = []
        self._logits: list[tuple[Tensor, Tensor]] = []

    def update(self, output: Any, target: Tensor) -> None:
        """Record a batch.

        Args:
            output: An `AdapterOutput`, or a tuple that begins with logits (B, C).
            target: True labels (B,) on the CPU.
        """
        prediction, probability = predict_labels(output[0], output[0].shape[-1])
        groups = getattr(output, "groups", None)
        groups = prediction.new_empty(len(prediction), 0) if groups is None else groups
        self._batches.append((target, prediction, probability.float(), groups))
        if self._every is not None:
            kept = slice(-self._seen % self._every, None, self._every)
            self._seen += len(target)
            self._logits.append((at_least_float32(output[0])[kept], target[kept]))

    def gather(self, positions: list[int], size: int, *, images: str | None = None, distributed: bool = False) -> None:
        """Set `result` to the recorded predictions in the order of the split, and forget them.

        Args:
            positions: Position in the split of every recorded image, in the order of recording.
            size: Images of the complete split.
            images: Checksums of the image names; see `image_names`.
            distributed: Join the images of all processes, which must all call this.
        """
        batches, self._batches = self._batches, []
        kept, self._logits, self._seen = self._logits, [], 0
        if self._every is not None:
            own = [torch.cat(field).cpu() for field in zip(*kept, strict=True)] if kept else None
            parts = [part for part in (_all_shards(own) if distributed else [own]) if part is not None]
            joined = [torch.cat(field) for field in zip(*parts, strict=True)] if parts else None
            self.logits = None if joined is None else (joined[0], joined[1])
        shard: list[Tensor] | None = None
        if batches:
            fields = (torch.cat(field).cpu() for field in zip(*batches, strict=True))
            shard = [torch.tensor(positions, dtype=torch.int64), *fields]
        found = [shard for shard in (_all_shards(shard) if distributed else [shard]) if shard is not None]
        if not found:  # no image can be read
            nothing = torch.empty(0, dtype=torch.int64)
            found = [[nothing, nothing, nothing, nothing.float(), nothing.view(0, 0)]]
        position, target, prediction, probability, groups = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = position.argsort()
        self.result = Predictions(
            target=target[order].long(),
            prediction=prediction[order],
            probability=probability[order],
            groups=groups[order] if groups.shape[1] else None,
            position=position[order] if len(position) < size else None,
            images=images,
        )


def _all_shards(shard: list[Tensor] | None) -> list[list[Tensor] | None]:
    if not (dist.is_available() and dist.is_initialized()):
        return [shard]
    shards: list[list[Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, shard)
    return shards


def image_names(split: Any) -> str | None:
    """Checksums of the names of classes and images of a split, as text; None for a dataset without names."""
    about = getattr(split, "about", None)
    return dumps(about()) if callable(about) else None


def write_predictions(path: Path, splits: Mapping[str, Predictions]) -> None:
    """Write predictions atomically; equal predictions give equal bytes.

    Args:
        path: The file, usually `PREDICTIONS` in the output folder of a run.
        splits: Predictions by name of the split: "train", "validation" or "test".

    Raises:
        OSError: The disk is full, or the folder is not writable; the earlier file is intact.
    """
    tensors = {
        f"{name}.{field}": value.clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory
        for name, predictions in splits.items()
        for field, value in predictions._asdict().items()
        if isinstance(value, Tensor)
    }
    images = {name: predictions.images for name, predictions in splits.items() if predictions.images is not None}
    # A single entry of metadata: safetensors writes several in a random order.
    write_atomic(path, save(tensors, {_ABOUT: dumps({"format_version": 1, "images": images})}))


def read_predictions(path: Path) -> dict[str, Predictions]:
    """Read and check predictions.

    Args:
        path: The file.

    Returns:
        Predictions by name of the split.

    Raises:
        StateError: The file does not exist.
        InputError: It is not a file of predictions, or its tensors do not fit together; the message names them.
    """
    if not path.is_file():
        raise StateError(
            f"{path} does not exist: the run is not finished, or an earlier version of lpt_peft wrote it. Run the same "
            "lpt-peft train command again, which resumes it."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}. Remove it and run the same command again.") from error
    about = loads(metadata.get(_ABOUT, "{}").encode(), f"The metadata of {path}", InputError)
    images = about.get("images")
    if about.get("format_version") != 1 or not isinstance(images, dict):
        raise InputError(f"{path} does not hold predictions of lpt_peft in format 1. Give the file of a run.")
    splits: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if (match := _NAME.fullmatch(name)) is None:
            raise InputError(f"{path} holds the tensor {name!r:.80}, which predictions do not have. It was changed.")
        splits.setdefault(match[1], {})[match[2]] = tensor
    return {name: _checked(path, name, fields, images.get(name)) for name, fields in splits.items()}


def _checked(path: Path, split: str, fields: Mapping[str, Tensor], images: Any) -> Predictions:
    def require(fits: bool, name: str, rule: str) -> None:
        if not fits:
            raise InputError(f"{path}: {split}.{name} must be {rule}. The file was changed; write it again.")

    for name in _REQUIRED:
        require(name in fields, name, "in the file")
    size = len(fields["target"])
    for name, tensor in fields.items():
        dtype = torch.float32 if name == "probability" else torch.int64
        shape = "(N, k)" if name == "groups" else "(N,)"
        shaped = tensor.ndim == (2 if name == "groups" else 1) and len(tensor) == size
        rule = f"{str(dtype).removeprefix('torch.')} {shape} with N={size}"
        require(tensor.dtype == dtype and shaped, name, f"{rule}, not {tensor.dtype} {tuple(tensor.shape)}")
        require(not bool((tensor < 0).any()), name, "at least 0")
    probability, position = fields["probability"], fields.get("position")
    require(bool((probability <= 1 + 1e-6).all()), "probability", "at most 1, and not NaN")
    ascending = position is None or bool((position.diff() > 0).all())
    require(ascending, "position", "in ascending order")
    require(images is None or isinstance(images, str), "images", "text")
    return Predictions(**fields, images=images)
