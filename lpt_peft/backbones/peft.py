"""A ViT inside PEFT's wrapper: the driver of the inner ViT, including its LoRA layers.

LoRA that is added after `wrap` needs no code: blocks call their layers, whatever their class.
"""

from __future__ import annotations

from typing import Any

from lpt_peft.backbones.base import Backbone


def open_backbone(model: Any) -> Backbone:
    """Return the driver for a model returned by `get_peft_model`.

    Raises:
        BackboneError: The inner model cannot take prompts.
    """
    from lpt_peft.backbones.detect import find_backbone  # noqa: PLC0415 - circular: detect imports this module

    mixed = not hasattr(model, "get_base_model")  # a PeftMixedModel
    backbone = find_backbone(model.base_model.model if mixed else model.get_base_model())
    backbone.model = model
    return backbone
