"""nn.MultiheadAttention with prompt keys and values, as torchvision's and open_clip's blocks need it.

The module is called, never changed: LoRA that peft put around it or inside it comes along. Not here: the blocks
that own it (`torchvision_vit.py`, `open_clip_blocks.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def attend(attention: Any, tokens: Tensor, prompt: Tensor) -> Tensor:
    """Tokens attend to themselves and to the prompt.

    Args:
        attention: nn.MultiheadAttention, batch first or not, or peft's LoRA around one.
        tokens: (B, N, d), normed.
        prompt: (1 or B, n, d), normed.

    Returns:
        (B, N, d).
    """
    # One tensor as key and value: both projections are then one product.
    keys = torch.cat([tokens, prompt.expand(tokens.shape[0], -1, -1)], dim=1)
    if attention.batch_first:
        out: Tensor = attention(tokens, keys, keys, need_weights=False)[0]
        return out
    keys = keys.transpose(0, 1)
    turned: Tensor = attention(tokens.transpose(0, 1), keys, keys, need_weights=False)[0]
    return turned.transpose(0, 1)


def warn_of_lora(attentions: Iterable[Any]) -> None:
    """Say what peft's LoRA around an nn.MultiheadAttention does to the fingerprint in prompt files."""
    if any(hasattr(attention, "base_layer") for attention in attentions):
        warnings.warn(
            "peft's LoRA on nn.MultiheadAttention adds its update to the weights and takes it away again at every "
            "forward, which moves their last bits: prompts are right, but a prompt file may not know its backbone "
            'again. Merge the LoRA before wrap (merge_and_unload()), or load with check_backbone="warn".',
            UserWarning,
            stacklevel=2,
        )
