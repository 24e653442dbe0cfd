"""The ViTs the adapter can drive; each ecosystem's file is imported only when a model of it comes along."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from lpt_peft.backbones.base import Backbone, BackboneInfo, Stream
from lpt_peft.errors import BackboneError

__all__ = ["Backbone", "BackboneInfo", "Stream", "find_backbone"]

# Top-level package of the model's classes -> our file.
_ECOSYSTEMS = {
    "open_clip": "lpt_peft.backbones.open_clip_vit",
    "peft": "lpt_peft.backbones.peft_model",
    "timm": "lpt_peft.backbones.timm.families",
    "torchvision": "lpt_peft.backbones.torchvision_vit",
    "transformers": "lpt_peft.backbones.transformers",
}

# What people put around a ViT, by class name: where prompts go instead.
_WRAPPERS = {
    "LongTailPromptAdapter": "it has its own; give wrap() the ViT, or unwrap() this adapter first",
    "ScriptModule": "its forward is fixed; wrap the Python model, then torch.compile or torch.export the adapter",
    "OptimizedModule": "its forward is fixed; wrap the model inside (._orig_mod), then torch.compile the adapter",
    "DataParallel": "it copies the model for each call; wrap the model inside (.module), then put "
    "DistributedDataParallel around the adapter",
    "DistributedDataParallel": "wrap the model inside (.module), then put DistributedDataParallel around the adapter",
    "FullyShardedDataParallel": "its parameters are sharded; wrap the model first, then fully_shard the adapter",
    "FSDPModule": "its parameters are sharded; wrap the model first, then fully_shard blocks and adapter",
}


def find_backbone(model: nn.Module) -> Backbone:
    """The driver for `model`, which is left as it is.

    Raises:
        BackboneError: No driver fits; the message names the class and the nearest thing that works.
    """
    if not isinstance(model, nn.Module):
        raise BackboneError(f"wrap() takes a ViT (torch.nn.Module), got {type(model).__name__}.")
    for cls in type(model).__mro__:
        if (cure := _WRAPPERS.get(cls.__name__)) is not None:
            raise BackboneError(f"{type(model).__name__} cannot take prompts: {cure}.")
        if (name := _ECOSYSTEMS.get(cls.__module__.partition(".")[0])) is not None:
            backbone: Backbone = import_module(name).open_backbone(model)
            return backbone
    raise BackboneError(
        f"{type(model).__name__} of {type(model).__module__} is no ViT that lpt_peft knows. What works: plain ViTs of "
        'timm (timm.create_model("vit_base_patch16_224")), transformers (ViTModel, Dinov2Model, CLIPVisionModel), '
        "torchvision and open_clip, and PEFT models of these."
    )
