"""The ViTs the adapter can drive; each ecosystem's file is imported only when a model of it comes along."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from lpt_peft.backbones.base import Backbone, BackboneInfo, Stream
from lpt_peft.errors import BackboneError

__all__ = ["Backbone", "BackboneInfo", "Stream", "find_backbone"]

_ECOSYSTEMS = {"timm": "lpt_peft.backbones.timm_vit"}  # top-level package of the model's classes -> our file


def find_backbone(model: nn.Module) -> Backbone:
    """The driver for `model`, which is left as it is.

    Raises:
        BackboneError: No driver fits; the message names the class and the nearest thing that works.
    """
    if not isinstance(model, nn.Module):
        raise BackboneError(f"wrap() takes a ViT (torch.nn.Module), got {type(model).__name__}.")
    for cls in type(model).__mro__:
        if (name := _ECOSYSTEMS.get(cls.__module__.partition(".")[0])) is not None:
            backbone: Backbone = import_module(name).open_backbone(model)
            return backbone
    raise BackboneError(
        f"{type(model).__name__} of {type(model).__module__} is not a ViT that lpt_peft knows. What works: timm's "
        'VisionTransformer, for example timm.create_model("vit_base_patch16_224", pretrained=True).'
    )
