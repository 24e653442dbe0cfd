"""Prompt files on disk, format version 1: `config.json` and `prompts.safetensors` in a folder.

`save_prompts` and `load_prompts` are what `adapter.save_pretrained` and `LongTailPromptAdapter.from_pretrained`
call; `read_prompt_file` looks into a file without a ViT; `encode` and `decode` work on bytes. The format is
told in docs/explanation/prompt-file.md. Not here: the Hub.
"""

from lpt_peft.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from lpt_peft.checkpoint.pretrained import CheckBackbone, load_prompts, save_prompts
from lpt_peft.checkpoint.prompt_file import PromptFile, decode, encode, read_prompt_file, write_prompt_file
from lpt_peft.checkpoint.schema import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, parse_config, tensor_bytes
from lpt_peft.checkpoint.tensors import check_size

__all__ = [
    "CONFIG_NAME",
    "MAX_CONFIG_BYTES",
    "MAX_HEADER_BYTES",
    "WEIGHTS_NAME",
    "CheckBackbone",
    "PromptFile",
    "check_size",
    "decode",
    "encode",
    "load_prompts",
    "parse_config",
    "read_prompt_file",
    "save_prompts",
    "tensor_bytes",
    "write_prompt_file",
]
