"""Finding the driver of a model by the library that defines its class."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from lpt_peft.backbones.base import Backbone
from lpt_peft.errors import BackboneError, ConfigError

# Top-level package of the model's classes -> module with open_backbone, imported on first use.
_LIBRARIES = {
    "open_clip": "lpt_peft.backbones.open_clip",
    "peft": "lpt_peft.backbones.peft",
    "timm": "lpt_peft.backbones.timm.families",
    "torchvision": "lpt_peft.backbones.torchvision",
    "transformers": "lpt_peft.backbones.transformers",
}

# Wrappers around a ViT, by class name, and what to do instead.
_WRAPPERS = {
    "LongTailPromptAdapter": "it already has prompts; give wrap() the ViT, or unwrap() this adapter first",
    "ActivationWrapper": "wrap the model inside (._checkpoint_wrapped_module), then checkpoint the adapter's blocks",
    "ScriptModule": "its forward is fixed; wrap the Python model, then torch.compile or torch.export the adapter",
    "OptimizedModule": "its forward is fixed; wrap the model inside (._orig_mod), then torch.compile the adapter",
    "DataParallel": "it copies the model for each call; wrap the model inside (.module), then put "
    "DistributedDataParallel around the adapter",
    "DistributedDataParallel": "wrap the model inside (.module), then put DistributedDataParallel around the adapter",
    "FullyShardedDataParallel": "its parameters are sharded; wrap the model first, then fully_shard the adapter",
    "FSDPModule": "its parameters are sharded; wrap the model first, then fully_shard blocks and adapter",
}


def find_backbone(model: nn.Module) -> Backbone:
    """Return the driver for `model`, which is not changed.

    Raises:
        BackboneError: No driver fits; the message names the class and the nearest alternative.
    """
    if not isinstance(model, nn.Module):
        raise BackboneError(f"wrap() takes a ViT (torch.nn.Module), got {type(model).__name__}.")
    for cls in type(model).__mro__:
        if (hint := _WRAPPERS.get(cls.__name__)) is not None:
            raise BackboneError(f"{type(model).__name__} cannot take prompts: {hint}.")
        if (name := _LIBRARIES.get(cls.__module__.partition(".")[0])) is not None:
            backbone: Backbone = import_module(name).open_backbone(model)
            return backbone
    hint = _content(model)
    raise BackboneError(
        f"{type(model).__name__} of {type(model).__module__} is not a ViT that lpt_peft supports. Supported: plain "
        'ViTs of timm (timm.create_model("vit_base_patch16_224")), transformers (ViTModel, Dinov2Model, '
        f"CLIPVisionModel), torchvision and open_clip, and PEFT models of these.{hint}"
    )


def resolve_num_classes(backbone: Backbone, num_classes: int | None) -> int:
    """Return the number of classes for a new head; None takes that of the model's classifier.

    Raises:
        ConfigError: None, and the model has no classifier.
    """
    if num_classes is None and backbone.num_classes < 1:
        raise ConfigError(f"This {type(backbone.model).__name__} has no classifier: give wrap(vit, num_classes=...).")
    return backbone.num_classes if num_classes is None else num_classes


def _content(model: nn.Module) -> str:
    """A hint for custom modules: the ViT or adapter that they contain."""
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "LongTailPromptAdapter" in kinds:
            return f' It contains an adapter, model.get_submodule("{name}"), which already has prompts.'
        if name and type(module).__module__.partition(".")[0] in _LIBRARIES:
            try:
                find_backbone(module)
            except BackboneError:
                continue
            return f' It contains a {type(module).__name__}: wrap model.get_submodule("{name}").'
    return ""
