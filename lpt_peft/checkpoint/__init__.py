"""Prompt files on disk, format version 2: `prompts.safetensors`, and `config.json` as its readable copy.

`PromptContent` holds plain values and tensors, and this package converts it to and from bytes and folders. The format
is described in docs/explanation/prompt-file.md. Not here: adapters (`lpt_peft.pretrained`), the Hub (`lpt_peft.hub`).
"""

from lpt_peft.checkpoint.content import USAGE, PromptContent
from lpt_peft.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from lpt_peft.checkpoint.limits import check_writable
from lpt_peft.checkpoint.match import CheckBackbone, check_match
from lpt_peft.checkpoint.prompt_file import (
    MAX_FILE_BYTES,
    Encoded,
    decode,
    encode,
    read_prompt_file,
    write_prompt_file,
)
from lpt_peft.checkpoint.relabel import LabelChanges, relabel

__all__ = [
    "CONFIG_NAME",
    "MAX_FILE_BYTES",
    "USAGE",
    "WEIGHTS_NAME",
    "CheckBackbone",
    "Encoded",
    "LabelChanges",
    "PromptContent",
    "check_match",
    "check_writable",
    "decode",
    "encode",
    "read_prompt_file",
    "relabel",
    "write_prompt_file",
]
