"""prompts.safetensors: tensors to bytes that are the same every time, and bytes from anyone to tensors.

safetensors stores and loads; here the header is written sorted (the library's own order of metadata keys is
random, so every save would be a new commit) and read strictly before the library sees the bytes.
Not here: where the bytes come from (`files.py`).
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

from lpt_peft.checkpoint.rules import BrokenRule, items, one_of, record, text, whole
from lpt_peft.checkpoint.schema import DTYPE_BYTES, MAX_HEADER_BYTES
from lpt_peft.checkpoint.strict_json import dumps, loads
from lpt_peft.errors import PromptFileFormatError, PromptFileIntegrityError, PromptFileTensorError, StateError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_METADATA_KEY = "lpt_peft"
_ENTRY = record(
    {"dtype": text, "shape": items(whole(0), 0, 8), "data_offsets": items(whole(0), 2, 2)},
)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """List dtype and shape of each tensor, as in config.json.

    Raises:
        StateError: A dtype that the format does not have, or a value that is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise StateError(
                f"{name} is {tensor.dtype}; a prompt file holds float32, float16 or bfloat16. If rounding is fine, "
                "call adapter.shared.float(), adapter.pool.float() and adapter.head.float() first; adapter.float() "
                "would cast the ViT, too."
            )
        if not bool(tensor.isfinite().all()):
            raise StateError(f"{name} holds NaN or infinity; the training that made it diverged. Nothing was written.")
    return {name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)} for name, tensor in tensors.items()}


def encode_tensors(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> bytes:
    """Tensors (F32, F16, BF16) and the configuration to the bytes of prompts.safetensors; equal in, equal out.

    Raises:
        BrokenRule: The header would be larger than a reader takes.
    """
    # A copy each: safetensors refuses tensors that share memory or are not contiguous.
    dense = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    plain = safetensors.torch.save(dense)
    start = 8 + int.from_bytes(plain[:8], "little")
    header = loads(plain[8:start], "the header")
    header["__metadata__"] = {"format": "pt", _METADATA_KEY: dumps(content)}
    raw = dumps(header).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise BrokenRule(
            f"the header takes {len(raw)} bytes, at most {MAX_HEADER_BYTES} are read; "
            "shorten label_names or leave class_counts out"
        )
    return len(raw).to_bytes(8, "little") + raw + plain[start:]


def check_size(size: int, config: Mapping[str, Any]) -> None:
    """Compare a file's size, before it is read or fetched, with what config.json says.

    Raises:
        PromptFileIntegrityError: They differ.
    """
    wanted = config["weights"]["size"]
    if size != wanted:
        raise PromptFileIntegrityError(
            f"prompts.safetensors has {size} bytes, config.json says {wanted}: truncated, of another save, or a Git "
            "LFS pointer. Fetch or copy both files anew."
        )


def decode_tensors(data: bytes, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bytes of prompts.safetensors to its tensors, on the CPU.

    Args:
        data: The whole file.
        config: Checked content of the config.json that belongs to it.

    Raises:
        PromptFileIntegrityError: Size or sha256 are not config.json's, or the file is from another save.
        PromptFileFormatError: The header breaks the format.
        PromptFileTensorError: Names, dtypes, shapes or offsets are not those of config.json; a value is not finite.
    """
    check_size(len(data), config)
    digest = hashlib.sha256(data).hexdigest()
    if digest != config["weights"]["sha256"]:
        raise PromptFileIntegrityError(
            f"prompts.safetensors has sha256 {digest[:12]}..., config.json says {config['weights']['sha256'][:12]}...: "
            "a byte changed, or the two files are from different saves. Fetch or copy both anew."
        )
    _check_header(data, config)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:  # our checks should leave none; whatever they miss is still a format error
        raise PromptFileFormatError(f"safetensors refuses prompts.safetensors: {error}.") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise PromptFileTensorError(f"{name} holds NaN or infinity; the training that made it diverged.")
    return tensors


def _check_header(data: bytes, config: Mapping[str, Any]) -> None:
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise PromptFileFormatError(
            f"prompts.safetensors declares a header of {length} bytes; the file has {len(data)} and at most "
            f"{MAX_HEADER_BYTES} are read."
        )
    header = loads(data[8 : 8 + length], "The header of prompts.safetensors")
    metadata = header.pop("__metadata__", None)
    try:
        record({"format": one_of("pt"), _METADATA_KEY: _any_text})(metadata, "__metadata__")
        for name, entry in header.items():
            _ENTRY(entry, name)
    except BrokenRule as error:
        raise PromptFileFormatError(f"The header of prompts.safetensors breaks the format: {error}.") from error
    _check_entries(header, config["tensors"], len(data) - 8 - length)
    content = loads(metadata[_METADATA_KEY].encode("utf-8"), "The configuration in prompts.safetensors")
    wanted = {key: value for key, value in config.items() if key != "weights"}
    # As text: to Python 1, 1.0 and true are equal.
    if dumps(content) != dumps(wanted):
        differing = sorted(
            key for key in content.keys() | wanted.keys() if dumps(content.get(key)) != dumps(wanted.get(key))
        )
        raise PromptFileIntegrityError(
            f"config.json and the configuration in prompts.safetensors differ in {differing[:8]}: one was edited, or "
            "the two files are from different saves. Fetch or copy both anew."
        )


def _check_entries(entries: Mapping[str, Any], tensors: Mapping[str, Any], size: int) -> None:
    """Header entries are config.json's tensors and cover the `size` bytes of data, without gap or overlap."""
    if entries.keys() != tensors.keys():
        missing, extra = sorted(tensors.keys() - entries.keys()), sorted(entries.keys() - tensors.keys())
        raise PromptFileTensorError(
            f"prompts.safetensors does not hold the tensors config.json lists: missing {missing}, unknown {extra[:8]}."
        )
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        wanted = tensors[name]
        if (entry["dtype"], entry["shape"]) != (wanted["dtype"], wanted["shape"]):
            raise PromptFileTensorError(
                f"{name} is {entry['dtype']} {entry['shape']} in prompts.safetensors, {wanted['dtype']} "
                f"{wanted['shape']} in config.json."
            )
        start = end
        end = start + DTYPE_BYTES[wanted["dtype"]] * math.prod(wanted["shape"])
        if entry["data_offsets"] != [start, end]:
            raise PromptFileTensorError(
                f"{name} lies at {entry['data_offsets']} in prompts.safetensors and should at {[start, end]}."
            )
    if end != size:
        raise PromptFileTensorError(f"The tensors of prompts.safetensors take {end} bytes, the file has {size}.")


def _any_text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise BrokenRule(f"{path} must be text")
