"""Model files: the weights of a method without prompts, as `model.safetensors` and `config.json` in a folder.

`model.safetensors` holds tensors under their usual names, so any program can load it: `head.weight` of a linear probe;
with full fine-tuning also the weights of the ViT, under its own names. `config.json` describes them and holds the
sha256 of that file. Not here: models (`lpt_peft.vit_classifier`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lpt_peft._json import BrokenRule, dumps, integer, loads, object_of, one_of, sha256
from lpt_peft._version import __version__
from lpt_peft.backbones import BackboneInfo
from lpt_peft.checkpoint.description import (
    DESCRIPTION,
    check_description,
    content_fields,
    describe_content,
    plain_json,
)
from lpt_peft.checkpoint.files import CONFIG_NAME, MAX_COPY_BYTES, expand_user, open_regular, write_files
from lpt_peft.checkpoint.schema import MAX_TENSOR_BYTES
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import InputError, ModelFileError, ModelFileNotFoundError, PromptFileError, StateError

MODEL_FORMAT, MODEL_FORMAT_VERSION = "lpt_peft-model", 1
MODEL_NAME = "model.safetensors"
HEAD_WEIGHT = "head.weight"
MAX_MODEL_BYTES = MAX_TENSOR_BYTES
"""Size of the largest `model.safetensors` that is read."""

ModelMethod = Literal["linear_probe", "full"]
MODEL_METHODS: tuple[ModelMethod, ...] = ("linear_probe", "full")

_RULE = object_of(
    {
        "format": one_of(MODEL_FORMAT),
        "format_version": integer(MODEL_FORMAT_VERSION, MODEL_FORMAT_VERSION),
        "method": one_of(*MODEL_METHODS),
        **DESCRIPTION,
        "weights": object_of({"file": one_of(MODEL_NAME), "bytes": integer(0, MAX_MODEL_BYTES), "sha256": sha256}),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelContent:
    """Content of a model file.

    Attributes:
        method: "linear_probe": the tensors are those of the head; "full": of the ViT and the head.
        tensors: `head.weight` (C, d), and the ViT's tensors by their names in its state dict. From a file: on the CPU.
        num_classes: Classes `C` of the head.
        logit_scale: Scale of the cosine classifier.
        metadata: Class counts, label names, training record.
        backbone: Model of the training.
        preprocess: How images become tensors, as in prompt files.
        fingerprint: `sha256-tensors-v1` of the ViT's weights without its classifier: with "full", after the training.
        library_version: Version of lpt_peft that wrote the file.
    """

    method: ModelMethod
    tensors: Mapping[str, Tensor]
    num_classes: int
    logit_scale: float
    metadata: PromptMetadata
    backbone: BackboneInfo
    preprocess: Mapping[str, Any]
    fingerprint: str
    library_version: str = __version__


def encode_model(content: ModelContent) -> tuple[bytes, dict[str, Any]]:
    """Encode content as the bytes of `model.safetensors` and the configuration; equal content gives equal bytes.

    Raises:
        InputError: A value does not fit the format.
        StateError: A tensor is not finite.
    """
    for name, tensor in content.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StateError(f"{name} holds NaN or infinity: the training diverged. Nothing was written.")
    # A copy each: safetensors refuses tensors that share memory or are not contiguous.
    dense = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in content.tensors.items()}
    weights = safetensors.torch.save(dense, {"format": "pt"})  # transformers requires this entry
    if len(weights) > MAX_MODEL_BYTES:
        raise InputError(f"{MODEL_NAME} would have {len(weights)} bytes, and at most {MAX_MODEL_BYTES} are read.")
    return weights, _config(content, len(weights), hashlib.sha256(weights).hexdigest())


def check_model_writable(content: ModelContent) -> None:
    """Check, before a training, that everything but the tensors can be written.

    Raises:
        InputError: A value does not fit the format.
    """
    _config(content, 0, "0" * 64)


def write_model_file(folder: str | PathLike[str], content: ModelContent) -> None:
    """Write content to a folder: `model.safetensors`, then `config.json`, each in one step.

    A process that is killed between the two leaves a folder that `read_model_file` refuses.

    Args:
        folder: Created if missing; its other files are not touched.
        content: What to write.

    Raises:
        InputError: A value does not fit the format; nothing was written.
        StateError: A tensor is not finite; nothing was written.
        PromptFileExistsError: The folder holds another library's `config.json`; nothing was written.
        ConfigError: The folder is a file.
        OSError: The disk is full, or the folder is not writable.
    """
    weights, config = encode_model(content)
    text = (dumps(config, indent=2) + "\n").encode("utf-8")
    write_files(expand_user(folder), weights, text, weights_name=MODEL_NAME, format=MODEL_FORMAT)


def read_model_file(folder: str | PathLike[str]) -> ModelContent:
    """Read the model file of a folder, which may come from an untrusted source.

    Raises:
        ModelFileNotFoundError: A file is missing.
        ModelFileError: The configuration breaks the format, or the weights are not those that were written.
    """
    path = expand_user(folder)
    config = read_model_config(path)
    expected = config["weights"]
    weights = _read(path, MODEL_NAME, expected["bytes"])
    if len(weights) != expected["bytes"] or hashlib.sha256(weights).hexdigest() != expected["sha256"]:
        raise ModelFileError(
            f"{path / MODEL_NAME} does not have the size and sha256 that {CONFIG_NAME} states: it is truncated or "
            "changed, or its writing was interrupted. Copy both files again, or run the training command again, which "
            "writes them without training."
        )
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ModelFileError(f"safetensors refuses {path / MODEL_NAME}: {error}. Copy the file again.") from error
    head = tensors.get(HEAD_WEIGHT)
    num_classes = config["head"]["num_classes"]
    if head is None or head.ndim != 2 or len(head) != num_classes or not head.is_floating_point():
        found = "missing" if head is None else f"{head.dtype} of shape {tuple(head.shape)}"
        raise ModelFileError(f"{HEAD_WEIGHT} of {path / MODEL_NAME} is {found}, and must be ({num_classes}, d).")
    if config["method"] == "linear_probe" and len(tensors) != 1:
        raise ModelFileError(f"{path / MODEL_NAME} of a linear probe holds {len(tensors)} tensors, not the head alone.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelFileError(f"{name} in {path / MODEL_NAME} holds NaN or infinity: the training diverged.")
    return ModelContent(
        method=config["method"],
        tensors=tensors,
        num_classes=num_classes,
        logit_scale=config["head"]["logit_scale"],
        **content_fields(config),
    )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of a model file.

    Raises:
        ModelFileNotFoundError: It is missing.
        ModelFileError: It breaks the format.
    """
    name = str(folder / CONFIG_NAME)
    config = loads(_read(folder, CONFIG_NAME, MAX_COPY_BYTES), name, ModelFileError)
    if config.get("format") != MODEL_FORMAT:
        raise ModelFileError(f'{name} is not that of a model file: it has no "format": "{MODEL_FORMAT}".')
    version = config.get("format_version")
    if isinstance(version, int) and version > MODEL_FORMAT_VERSION:
        raise ModelFileError(
            f"{name} has format version {version}; lpt_peft {__version__} reads {MODEL_FORMAT_VERSION}. Upgrade "
            "lpt_peft: pip install -U lpt_peft."
        )
    try:
        _RULE(config, "")
        check_description(config)
    except BrokenRule as error:
        raise ModelFileError(f"{name} breaks the format: {error}. Copy the file again.") from error
    return config


def _config(content: ModelContent, size: int, digest: str) -> dict[str, Any]:
    config = {
        "format": MODEL_FORMAT,
        "format_version": MODEL_FORMAT_VERSION,
        "library_version": content.library_version,
        "method": content.method,
        **describe_content(content, content.num_classes, content.logit_scale),
        "weights": {"file": MODEL_NAME, "bytes": size, "sha256": digest},
    }
    try:
        checked = plain_json(config)
        _RULE(checked, "")
        check_description(checked)
    except BrokenRule as error:
        raise InputError(f"This model cannot be saved: {error}.") from error
    if len(dumps(checked, indent=2)) > MAX_COPY_BYTES // 4:  # a character takes at most 4 bytes
        raise InputError(f"This model cannot be saved: {CONFIG_NAME} would exceed {MAX_COPY_BYTES // 4} characters.")
    return checked


def _read(folder: Path, name: str, most: int) -> bytes:
    """The content of a file, or one byte more than `most`."""
    path = folder / name
    if not path.exists():
        raise ModelFileNotFoundError(
            f"{path} does not exist. A model file is a folder with {MODEL_NAME} and {CONFIG_NAME}, as lpt-peft train "
            "--method full writes it."
        )
    try:
        with open_regular(path) as (stream, _):
            return stream.read(most + 1)
    except PromptFileError as error:
        raise ModelFileError(str(error)) from error
