"""Model files: a folder with the weights of a method without prompts, and `config.json`.

Of a linear probe, `model.safetensors` holds `head.weight`. With full fine-tuning it holds the ViT's weights under the
names of its state dict and nothing else, since strict loaders refuse further tensors, and `head.safetensors` holds
`head.weight`. `config.json` describes them and holds their sha256. Not here: models (`lpt_peft.vit_classifier`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lpt_peft._json import BrokenRule, dumps, integer, loads, object_of, one_of, require, sha256
from lpt_peft._run_folder import MODEL_METHODS, ModelMethod
from lpt_peft._version import __version__
from lpt_peft.backbones import BackboneInfo
from lpt_peft.checkpoint.description import (
    DESCRIPTION,
    check_description,
    content_fields,
    describe_content,
    plain_json,
)
from lpt_peft.checkpoint.files import CONFIG_NAME, MAX_COPY_BYTES, expand_user, open_regular, write_folder
from lpt_peft.checkpoint.schema import MAX_TENSOR_BYTES
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import InputError, ModelFileError, ModelFileNotFoundError, PromptFileError, StateError

MODEL_FORMAT, MODEL_FORMAT_VERSION = "lpt_peft-model", 1
MODEL_NAME, HEAD_NAME = "model.safetensors", "head.safetensors"
HEAD_WEIGHT = "head.weight"
MAX_MODEL_BYTES = MAX_TENSOR_BYTES
"""Size of the largest file of weights that is read."""

_FILES: dict[ModelMethod, tuple[str, ...]] = {"linear_probe": (MODEL_NAME,), "full": (MODEL_NAME, HEAD_NAME)}
_WEIGHTS = object_of({"bytes": integer(0, MAX_MODEL_BYTES), "sha256": sha256})
_RULE = object_of(
    {
        "format": one_of(MODEL_FORMAT),
        "format_version": integer(MODEL_FORMAT_VERSION, MODEL_FORMAT_VERSION),
        "method": one_of(*MODEL_METHODS),
        **DESCRIPTION,
        "weights": object_of({MODEL_NAME: _WEIGHTS}, {HEAD_NAME: _WEIGHTS}),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelContent:
    """Content of a model file.

    Attributes:
        method: "linear_probe" or "full".
        head: Class vectors (C, d), floating point. From a file: on the CPU, like `vit`.
        vit: The ViT's tensors by their names in its state dict; empty for "linear_probe".
        logit_scale: Scale of the cosine classifier.
        metadata: Class counts, label names, training record.
        backbone: Model of the training.
        preprocess: How images become tensors, as in prompt files.
        fingerprint: `sha256-tensors-v1` of the ViT's weights without its classifier: with "full", after the training.
        library_version: Version of lpt_peft that wrote the file.
    """

    method: ModelMethod
    head: Tensor
    vit: Mapping[str, Tensor]
    logit_scale: float
    metadata: PromptMetadata
    backbone: BackboneInfo
    preprocess: Mapping[str, Any]
    fingerprint: str
    library_version: str = __version__


def encode_model(content: ModelContent) -> dict[str, bytes]:
    """Encode content as the bytes of each file, `config.json` last; equal content gives equal bytes.

    Raises:
        InputError: A value does not fit the format.
        StateError: A tensor is not finite.
    """
    for name, tensor in {**content.vit, HEAD_WEIGHT: content.head}.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StateError(f"{name} holds NaN or infinity: the training diverged. Nothing was written.")
    head = {HEAD_WEIGHT: content.head}
    tensors = (head,) if content.method == "linear_probe" else (content.vit, head)
    files = {name: _save(group) for name, group in zip(_FILES[content.method], tensors, strict=True)}
    if (size := max(map(len, files.values()))) > MAX_MODEL_BYTES:
        raise InputError(f"This model cannot be saved: it takes {size} bytes, at most {MAX_MODEL_BYTES} are read.")
    stated = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    return {**files, CONFIG_NAME: (dumps(_config(content, stated), indent=2) + "\n").encode("utf-8")}


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    # A copy each: safetensors refuses tensors that share memory or are not contiguous.
    dense = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(dense, {"format": "pt"})  # transformers requires this entry


def check_model_writable(content: ModelContent) -> None:
    """Check, before a training, that everything but the tensors can be written.

    Raises:
        InputError: A value does not fit the format.
    """
    _config(content, {name: {"bytes": 0, "sha256": "0" * 64} for name in _FILES[content.method]})


def write_model_file(folder: str | PathLike[str], content: ModelContent) -> None:
    """Write content to a folder: the weights, then `config.json`, each file in one step.

    A process that is killed between them leaves a folder that `read_model_file` refuses.

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
    files = encode_model(content)
    write_folder(expand_user(folder), files, MODEL_FORMAT)


def read_model_file(folder: str | PathLike[str]) -> ModelContent:
    """Read the model file of a folder, which may come from an untrusted source.

    Raises:
        ModelFileNotFoundError: A file is missing.
        ModelFileError: The configuration breaks the format, or the weights are not those that were written.
    """
    path = expand_user(folder)
    config = read_model_config(path)
    names = _FILES[config["method"]]
    tensors = {name: _load(path, name, config["weights"][name]) for name in names}
    head = tensors[names[-1]].get(HEAD_WEIGHT)
    num_classes = config["head"]["num_classes"]
    if head is None or head.ndim != 2 or len(head) != num_classes or not head.is_floating_point():
        found = "missing" if head is None else f"{head.dtype} of shape {tuple(head.shape)}"
        raise ModelFileError(f"{HEAD_WEIGHT} in {path / names[-1]} is {found}, and must be ({num_classes}, d).")
    if (count := len(tensors[names[-1]])) != 1:
        raise ModelFileError(f"{path / names[-1]} holds {count} tensors, and must hold the head alone.")
    return ModelContent(
        method=config["method"],
        head=head,
        vit=tensors[MODEL_NAME] if config["method"] == "full" else {},
        logit_scale=config["head"]["logit_scale"],
        **content_fields(config),
    )


def _load(folder: Path, name: str, stated: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of weights, after comparing its size and hash with those in `config.json`."""
    weights = _read(folder, name, stated["bytes"])
    if len(weights) != stated["bytes"] or hashlib.sha256(weights).hexdigest() != stated["sha256"]:
        raise ModelFileError(
            f"{folder / name} does not have the size and sha256 that {CONFIG_NAME} states: it is truncated or changed, "
            "or its writing was interrupted. Copy the folder again, or run the training command again, which writes it "
            "without training."
        )
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ModelFileError(f"safetensors refuses {folder / name}: {error}. Copy the file again.") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelFileError(f"{key} in {folder / name} holds NaN or infinity: the training diverged.")
    return tensors


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
        files = _FILES[config["method"]]
        require(config["weights"].keys() == set(files), sorted(config["weights"]), "weights", f"of {', '.join(files)}")
    except BrokenRule as error:
        raise ModelFileError(f"{name} breaks the format: {error}. Copy the file again.") from error
    return config


def _config(content: ModelContent, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    config = {
        "format": MODEL_FORMAT,
        "format_version": MODEL_FORMAT_VERSION,
        "library_version": content.library_version,
        "method": content.method,
        **describe_content(content, len(content.head), content.logit_scale),
        "weights": weights,
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
            f"{path} does not exist. A model file is a folder with {MODEL_NAME} and {CONFIG_NAME}, and {HEAD_NAME} "
            "after full fine-tuning, as lpt-peft train writes it."
        )
    try:
        with open_regular(path) as (stream, _):
            return stream.read(most + 1)
    except PromptFileError as error:
        raise ModelFileError(str(error)) from error
