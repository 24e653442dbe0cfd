"""A ViT inside PEFT's wrapper: the driver of the ViT within, whose LoRA layers come along.

Not here: LoRA put on after `wrap`, which needs nothing: the blocks call their layers, whatever these are.
"""

from __future__ import annotations

from typing import Any

from lpt_peft.backbones.base import Backbone


def open_backbone(model: Any) -> Backbone:
    """The driver for what `get_peft_model` returned.

    Raises:
        BackboneError: The model inside cannot take prompts.
    """
    from lpt_peft.backbones.detect import find_backbone  # noqa: PLC0415 - the model inside may be of any ecosystem

    mixed = not hasattr(model, "get_base_model")  # a PeftMixedModel
    backbone = find_backbone(model.base_model.model if mixed else model.get_base_model())
    backbone.model = model
    return backbone
