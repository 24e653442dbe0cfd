"""Bytes of `prompts.safetensors`: deterministic encoding, and strict decoding of bytes from untrusted sources.

safetensors stores and loads. Here its header is written sorted, because the library's own order of metadata keys is
random and every save would be a new commit, and is checked before the library reads the bytes. Two hashes find any
changed bit: `data_sha256` in the configuration covers the tensors, `header_sha256` covers the rest of the header, whose
form is canonical.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lpt_peft._json import BrokenRule, dumps, integer, list_of, loads, object_of, one_of, sha256, text
from lpt_peft.checkpoint.content import USAGE
from lpt_peft.checkpoint.schema import DTYPE_BYTES, check_config, check_version, tensor_bytes
from lpt_peft.errors import (
    InputError,
    PromptFileFormatError,
    PromptFileIntegrityError,
    PromptFileTensorError,
    StateError,
)

MAX_HEADER_BYTES = 2**20
PREFIX_BYTES = 8
"""Bytes before the header, which hold its length."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CONFIG_KEY, _HASH_KEY = "lpt_peft", "header_sha256"
_ENTRY = object_of({"dtype": text, "shape": list_of(integer(0), 0, 8), "data_offsets": list_of(integer(0), 2, 2)})
_LFS_PREFIX = b"version "


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """List dtype and shape of each tensor, as in the header.

    Raises:
        StateError: The format does not have the dtype, or a value is not finite.
    """
    for name, tensor in tensors.items():
        if name == USAGE:
            continue
        if tensor.dtype not in _DTYPES:
            raise StateError(
                f"{name} is {tensor.dtype}; a prompt file holds float32, float16 or bfloat16. If rounding is fine, "
                "call adapter.shared.float(), adapter.pool.float() and adapter.head.float() first; adapter.float() "
                "would also cast the ViT."
            )
        if not bool(tensor.isfinite().all()):
            raise StateError(f"{name} holds NaN or infinity: the training diverged. Nothing was written.")
    dtypes = {name: "I64" if name == USAGE else _DTYPES[tensor.dtype] for name, tensor in tensors.items()}
    return {name: {"dtype": dtypes[name], "shape": list(tensor.shape)} for name, tensor in tensors.items()}


def encode_file(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Encode tensors and configuration; equal arguments give equal bytes.

    Args:
        tensors: float32, float16 or bfloat16, and int64 for `pool.usage`.
        config: Checked, without `data_sha256`.

    Returns:
        The bytes of the file, and the configuration with `data_sha256`.

    Raises:
        InputError: The header exceeds the limit of a reader.
    """
    # A copy each: safetensors refuses tensors that share memory or are not contiguous.
    dense = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    plain = safetensors.torch.save(dense)
    start = PREFIX_BYTES + int.from_bytes(plain[:PREFIX_BYTES], "little")
    entries = loads(plain[PREFIX_BYTES:start], "the header", PromptFileFormatError)
    entries.pop("__metadata__", None)
    data = plain[start:]
    config = {**config, "data_sha256": hashlib.sha256(data).hexdigest()}
    header = encode_header(entries, config)
    return len(header).to_bytes(PREFIX_BYTES, "little") + header + data, config


def encode_header(entries: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """Encode the header, padded to a multiple of 8 bytes.

    Args:
        entries: dtype, shape and data_offsets of each tensor.
        config: The whole configuration.

    Raises:
        InputError: It exceeds the limit of a reader.
    """
    metadata = {"format": "pt", _CONFIG_KEY: dumps(config)}
    raw = _canonical_header(entries, {**metadata, _HASH_KEY: _header_hash(entries, metadata)})
    if len(raw) > MAX_HEADER_BYTES:
        raise InputError(
            f"These prompts cannot be saved: the header takes {len(raw)} bytes, at most {MAX_HEADER_BYTES} are read; "
            "shorten label_names or leave class_counts out."
        )
    return raw


def header_length(prefix: bytes, size: int) -> int:
    """Length of the header in bytes.

    Args:
        prefix: The first 8 bytes of the file.
        size: Size of the file in bytes.

    Raises:
        PromptFileIntegrityError: The file is too short, or is a Git LFS pointer.
        PromptFileFormatError: The header is longer than the limit or the file.
    """
    if prefix == _LFS_PREFIX and size < 1024:
        raise PromptFileIntegrityError(
            f"prompts.safetensors is a text of {size} bytes, probably a Git LFS pointer. Run git lfs pull."
        )
    if size < PREFIX_BYTES:
        raise PromptFileIntegrityError(f"prompts.safetensors is truncated: it has {size} bytes. Fetch it again.")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - PREFIX_BYTES):
        raise PromptFileFormatError(
            f"prompts.safetensors declares a header of {length} bytes; the file has {size} and at most "
            f"{MAX_HEADER_BYTES} are read. It is truncated, or not a prompt file."
        )
    return length


def decode_header(raw: bytes, size: int) -> dict[str, Any]:
    """Decode and check the header.

    Args:
        raw: The header.
        size: Bytes of the file after the header.

    Returns:
        The configuration.

    Raises:
        PromptFileFormatError: The header breaks the format.
        PromptFileVersionError: The file has another format version.
        PromptFileIntegrityError: A byte of the header changed, or the file is truncated.
        PromptFileTensorError: Names, dtypes, shapes or offsets do not match the configuration.
    """
    header = loads(raw, "The header of prompts.safetensors", PromptFileFormatError)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_CONFIG_KEY), str):
        raise PromptFileFormatError("This is not a prompt file: its header has no configuration of lpt_peft.")
    config = loads(metadata[_CONFIG_KEY].encode("utf-8"), "The configuration of the file", PromptFileFormatError)
    check_version(config)
    try:
        object_of({"format": one_of("pt"), _CONFIG_KEY: _any_text, _HASH_KEY: sha256})(metadata, "__metadata__")
        for name, entry in header.items():
            _ENTRY(entry, name)
    except BrokenRule as error:
        raise PromptFileFormatError(f"The header of prompts.safetensors breaks the format: {error}.") from error
    canonical = raw == _canonical_header(header, metadata) and dumps(config) == metadata[_CONFIG_KEY]
    if not canonical or _header_hash(header, metadata) != metadata[_HASH_KEY]:
        raise PromptFileIntegrityError(
            "The header of prompts.safetensors was changed after it was written. Fetch or copy the file again."
        )
    check_config(config)
    _check_entries(header, config["tensors"])
    if (needed := tensor_bytes(config)) != size:
        raise PromptFileIntegrityError(
            f"prompts.safetensors has {size} bytes after its header, its tensors take {needed}: truncated or extended. "
            "Fetch or copy the file again."
        )
    return config


def decode_tensors(data: bytes, start: int, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Decode the tensors, on the CPU.

    Args:
        data: The whole file.
        start: Where the tensors begin.
        config: From `decode_header`.

    Raises:
        PromptFileIntegrityError: A byte changed.
        PromptFileFormatError: safetensors refuses the file.
        PromptFileTensorError: A value is not finite, or a count is negative.
    """
    if hashlib.sha256(memoryview(data)[start:]).hexdigest() != config["data_sha256"]:
        raise PromptFileIntegrityError(
            "The tensors of prompts.safetensors do not have the sha256 that its header states: a byte changed. Fetch "
            "or copy the file again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:  # the checks above should leave none; a rule of a later version may
        raise PromptFileFormatError(f"safetensors refuses prompts.safetensors: {error}.") from error
    for name, tensor in tensors.items():
        if name == USAGE and bool((tensor < 0).any()):
            raise PromptFileTensorError(f"{name} holds a negative count. Save or fetch the file again.")
        if not bool(tensor.isfinite().all()):
            raise PromptFileTensorError(f"{name} holds NaN or infinity: the training diverged.")
    return tensors


def _canonical_header(entries: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    raw = dumps({**entries, "__metadata__": metadata}).encode("utf-8")
    return raw + b" " * (-len(raw) % 8)


def _header_hash(entries: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    hashed = {key: value for key, value in metadata.items() if key != _HASH_KEY}
    return hashlib.sha256(dumps({**entries, "__metadata__": hashed}).encode("utf-8")).hexdigest()


def _check_entries(entries: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """The header lists exactly these tensors, and they lie in the file without gap or overlap."""
    if entries.keys() != tensors.keys():
        missing, extra = sorted(tensors.keys() - entries.keys()), sorted(entries.keys() - tensors.keys())
        raise PromptFileTensorError(
            f"prompts.safetensors does not hold the tensors its configuration lists: missing {missing}, unknown "
            f"{extra[:8]}."
        )
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        spec = tensors[name]
        if (entry["dtype"], entry["shape"]) != (spec["dtype"], spec["shape"]):
            raise PromptFileTensorError(
                f"{name} is {entry['dtype']} {entry['shape']} in the header, {spec['dtype']} {spec['shape']} in the "
                "configuration."
            )
        start = end
        end = start + DTYPE_BYTES[spec["dtype"]] * math.prod(spec["shape"])
        if entry["data_offsets"] != [start, end]:
            raise PromptFileTensorError(
                f"{name} lies at {entry['data_offsets']} in prompts.safetensors instead of {[start, end]}."
            )


def _any_text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise BrokenRule(f"{path} must be text")
