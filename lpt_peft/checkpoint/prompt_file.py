"""PromptFile: the checked content of a prompt file, and its way to and from bytes and folders.

`decode` knows no folder and `encode` no disk: a transfer that has the bytes needs nothing more.
Not here: wrapping a ViT with what was read (`pretrained.py`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lpt_peft.adapter import LongTailPromptAdapter, Phase
from lpt_peft.backbones import BackboneInfo
from lpt_peft.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, left_configs, open_regular, state_of, write_pair
from lpt_peft.checkpoint.rules import BrokenRule
from lpt_peft.checkpoint.schema import MAX_CONFIG_BYTES, build_content, parse_config, prompt_config
from lpt_peft.checkpoint.strict_json import dumps
from lpt_peft.checkpoint.tensors import check_size, decode_tensors, describe, encode_tensors
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import InputError, PromptFileError, PromptFileFormatError, PromptFileNotFoundError

_ATTEMPTS = 10
_PAUSE = 0.005  # seconds, longer with every attempt; a writer's files are apart for microseconds


@dataclass(frozen=True, eq=False)
class PromptFile:
    """What a prompt file holds, checked.

    Attributes:
        config: Content of config.json, plain JSON values; the keys are in docs/explanation/prompt-file.md.
        tensors: `shared.prompts` (L, n, d), `pool.prompts` (m, L-K, n, d), `pool.keys` (m, d), `head.weight` (C, d);
            float32, float16 or bfloat16, on the CPU, every value finite.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def prompt_config(self) -> PromptConfig:
        """The sizes of prompts and head."""
        return prompt_config(self.config)

    @property
    def phase(self) -> Phase:
        """The phase the adapter was saved in, "shared" or "group"."""
        phase: Phase = self.config["prompt"]["phase"]
        return phase

    @property
    def metadata(self) -> PromptMetadata:
        """Class counts, label names and the record of the training."""
        counts, names = self.config["class_counts"], self.config["head"]["label_names"]
        return PromptMetadata(
            class_counts=None if counts is None else tuple(counts),
            label_names=None if names is None else tuple(names),
            training=self.config["training"],
        )


def encode(
    adapter: LongTailPromptAdapter,
    *,
    class_counts: Iterable[int] | None = None,
    label_names: Iterable[str] | None = None,
    training: Mapping[str, Any] | None = None,
    backbone: BackboneInfo | None = None,
) -> tuple[bytes, bytes]:
    """An adapter to the bytes of config.json and prompts.safetensors; equal adapters give equal bytes.

    Arguments and errors are those of `save_prompts`; `backbone` is what is known of the ViT where it cannot tell.
    """
    carried, tensors = adapter.metadata, adapter.adapter_state_dict()
    metadata = PromptMetadata(
        class_counts=carried.class_counts if class_counts is None else _counts(class_counts),
        label_names=carried.label_names if label_names is None else _names(label_names),
        training=carried.training if training is None else training,
    )
    try:
        content = build_content(adapter, describe(tensors), metadata, backbone or adapter.backbone.info())
        weights = encode_tensors(tensors, content)
        content["weights"] = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        config = (dumps(content, indent=2) + "\n").encode("utf-8")
        if len(config) > MAX_CONFIG_BYTES:
            raise BrokenRule(
                f"config.json takes {len(config)} bytes, at most {MAX_CONFIG_BYTES} are read; "
                "shorten label_names or leave class_counts out"
            )
    except BrokenRule as error:
        raise InputError(f"These prompts cannot be saved: {error}.") from error
    return config, weights


def decode(config: bytes, weights: bytes) -> PromptFile:
    """The bytes of config.json and prompts.safetensors, from anyone, to their checked content.

    Raises:
        PromptFileFormatError: config.json or the safetensors header breaks the format.
        PromptFileVersionError: Written by a later format version.
        PromptFileTensorError: Names, dtypes, shapes or values of the tensors are not what is needed.
        PromptFileIntegrityError: The bytes are not those that were written, or the two are of different saves.
    """
    content = parse_config(config)
    return PromptFile(content, decode_tensors(weights, content))


def read_prompt_file(folder: str | PathLike[str]) -> PromptFile:
    """Read a prompt file without a backbone: to look at it, or to check it.

    Only `config.json` and `prompts.safetensors` are opened, and no more is read than they may hold. A pair that
    changes while it is read is read again; where a writer was killed between the two files, the copy of config.json
    that it left and that belongs to the weights stands in.

    Raises:
        PromptFileNotFoundError: The folder or one of the two files is missing.
        PromptFileError: The file is refused; the class tells why, as in `decode`.
    """
    return _read(Path(folder))[0]


def read_pair(folder: str | PathLike[str]) -> tuple[bytes, bytes]:
    """The bytes of config.json and prompts.safetensors of a folder, after the checks of `read_prompt_file`.

    Raises:
        PromptFileNotFoundError: The folder or one of the two files is missing.
        PromptFileError: The file is refused; the class tells why, as in `decode`.
    """
    return _read(Path(folder))[1]


def write_prompt_file(folder: str | PathLike[str], config: bytes, weights: bytes) -> None:
    """Check the bytes of both files as a reader would, then write them: see `encode` and `save_prompts`.

    Raises:
        PromptFileError: A reader would refuse them; nothing was written.
        OSError: The disk is full, or the folder may not be written.
    """
    decode(config, weights)
    write_pair(Path(folder), config, weights)


def _read(folder: Path) -> tuple[PromptFile, tuple[bytes, bytes]]:
    for attempt in range(1, _ATTEMPTS + 1):
        before = state_of(folder)
        try:
            return _read_once(folder)
        except PromptFileError:
            after = state_of(folder)
            # A save is under way if the files changed, or if config.json is away and the weights are there.
            saving = after != before or (after[0] is None and after[1] is not None)
            if not saving or attempt == _ATTEMPTS:
                raise
        time.sleep(attempt * _PAUSE)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _read_once(folder: Path) -> tuple[PromptFile, tuple[bytes, bytes]]:
    try:
        return _read_files(folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    except PromptFileNotFoundError:
        for config in left_configs(folder):
            with suppress(PromptFileError):  # of the copies that a killed writer left, one belongs to the weights
                return _read_files(config, folder / WEIGHTS_NAME)
        raise


def _read_files(config_path: Path, weights_path: Path) -> tuple[PromptFile, tuple[bytes, bytes]]:
    with open_regular(config_path) as (stream, size):
        if size > MAX_CONFIG_BYTES:
            raise PromptFileFormatError(f"config.json has {size} bytes, at most {MAX_CONFIG_BYTES} are read.")
        config = stream.read(MAX_CONFIG_BYTES + 1)
    content = parse_config(config)
    with open_regular(weights_path) as (stream, size):
        check_size(size, content)
        weights = stream.read(size + 1)
    return PromptFile(content, decode_tensors(weights, content)), (config, weights)


def _counts(values: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in values)
    except TypeError as error:
        raise InputError("class_counts must hold one whole number, the training images, for each class.") from error


def _names(values: Iterable[str]) -> tuple[str, ...]:
    names = tuple(values)
    if isinstance(values, str) or not all(isinstance(name, str) for name in names):
        raise InputError('label_names must be a list with one text for each class, for example ["cat", "dog"].')
    return names
