"""Prompt files: content to and from bytes, and to and from folders.

Not here: adapters (`lpt_peft.pretrained`), repositories (`lpt_peft.hub`).
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

from lpt_peft._json import BrokenRule, dumps
from lpt_peft.checkpoint.content import PromptContent
from lpt_peft.checkpoint.files import WEIGHTS_NAME, expand_user, open_regular, write_files
from lpt_peft.checkpoint.schema import MAX_TENSOR_BYTES, config_to_content, content_to_config, tensor_bytes
from lpt_peft.checkpoint.tensors import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    decode_header,
    decode_tensors,
    describe,
    encode_file,
    header_length,
)
from lpt_peft.errors import InputError

MAX_FILE_BYTES = PREFIX_BYTES + MAX_HEADER_BYTES + MAX_TENSOR_BYTES
"""Size of the largest prompt file that is read."""


class Encoded(NamedTuple):
    """Bytes of a prompt file."""

    weights: bytes
    """`prompts.safetensors`, which holds everything."""
    copy: bytes
    """`config.json`, a readable copy of the configuration."""
    config: dict[str, Any]
    """The configuration itself."""


def encode(content: PromptContent) -> Encoded:
    """Encode content; equal content gives equal bytes.

    Raises:
        InputError: A value does not fit the format, or the header exceeds 1 MiB.
        StateError: A tensor is not finite, or of a dtype that the format does not have.
    """
    try:
        config = content_to_config(content, describe(content.tensors))
    except BrokenRule as error:
        raise InputError(f"These prompts cannot be saved: {error}.") from error
    weights, config = encode_file(content.tensors, config)
    return Encoded(weights, (dumps(config, indent=2) + "\n").encode("utf-8"), config)


def decode(weights: bytes) -> PromptContent:
    """Decode the bytes of `prompts.safetensors`, which may come from an untrusted source.

    Raises:
        PromptFileFormatError: The header breaks the format.
        PromptFileVersionError: The file has another format version.
        PromptFileTensorError: Names, dtypes, shapes or values of the tensors do not match the configuration.
        PromptFileIntegrityError: The bytes differ from those that were written.
    """
    start = PREFIX_BYTES + header_length(weights[:PREFIX_BYTES], len(weights))
    config = decode_header(weights[PREFIX_BYTES:start], len(weights) - start)
    return config_to_content(config, decode_tensors(weights, start, config))


def read_prompt_file(folder: str | PathLike[str]) -> PromptContent:
    """Read the prompt file of a folder; only `prompts.safetensors` is opened.

    Raises:
        PromptFileNotFoundError: The folder or the file is missing.
        PromptFileError: The file is refused; see `decode` for the classes.
    """
    with open_regular(expand_user(folder) / WEIGHTS_NAME) as (stream, size):
        prefix = stream.read(PREFIX_BYTES)
        header = stream.read(header_length(prefix, size))
        start = PREFIX_BYTES + len(header)
        config = decode_header(header, size - start)  # before the tensors are read: they may claim any size
        weights = prefix + header + stream.read(tensor_bytes(config))
    return config_to_content(config, decode_tensors(weights, start, config))


def write_prompt_file(folder: str | PathLike[str], content: PromptContent) -> None:
    """Write content to a folder: `prompts.safetensors`, and `config.json` as its readable copy.

    Args:
        folder: Created if missing; its other files are not touched.
        content: What to write.

    Raises:
        InputError: A value does not fit the format; nothing was written.
        StateError: A tensor is not finite, or of a dtype that the format does not have; nothing was written.
        PromptFileExistsError: The folder holds another library's `config.json`; nothing was written.
        ConfigError: The folder is a file.
        OSError: The disk is full, or the folder is not writable.
    """
    encoded = encode(content)
    write_files(expand_user(folder), encoded.weights, encoded.copy)
