"""Prompt files on disk, format version 1: `config.json` and `prompts.safetensors` in a folder.

`save_prompts` is what `adapter.save_pretrained` calls, `load_prompts` its inverse; `swap_prompts` gives a wrapped ViT
other prompts; `read_prompt_file` looks into a file without a ViT; `encode` and `decode` work on bytes. The format is
told in docs/explanation/prompt-file.md. Not here: the Hub.
"""

from lpt_peft.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from lpt_peft.checkpoint.pretrained import CheckBackbone, load_prompts, save_prompts, wrap_prompts
from lpt_peft.checkpoint.prompt_file import PromptFile, decode, encode, read_pair, read_prompt_file, write_prompt_file
from lpt_peft.checkpoint.schema import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, parse_config, tensor_bytes
from lpt_peft.checkpoint.swap import Part, swap_prompts
from lpt_peft.checkpoint.tensors import check_size

__all__ = [
    "CONFIG_NAME",
    "MAX_CONFIG_BYTES",
    "MAX_HEADER_BYTES",
    "WEIGHTS_NAME",
    "CheckBackbone",
    "Part",
    "PromptFile",
    "check_size",
    "decode",
    "encode",
    "load_prompts",
    "parse_config",
    "read_pair",
    "read_prompt_file",
    "save_prompts",
    "swap_prompts",
    "tensor_bytes",
    "wrap_prompts",
    "write_prompt_file",
]
