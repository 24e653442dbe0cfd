"""Finding the vision tower and its layers in a transformers model, by arguments and parts of modules.

Not here: running them (`vit.py`).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lpt_peft.errors import BackboneError
from lpt_peft.prompting import attentions_of

SUPPORTED = (
    "Supported: plain ViTs, for example ViTModel, Dinov2Model, DINOv3ViTModel, CLIPVisionModel, SiglipVisionModel."
)
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


class Parts(NamedTuple):
    """The parts of a model that the driver uses."""

    tower: Any
    """The vision model: the innermost module that takes pixel values and holds all layers."""
    layers: nn.ModuleList
    driven: Any
    """The module whose forward runs: the classification model, or the tower."""
    heads: tuple[str, ...]
    """Names of the linear classifiers of `driven`; empty if it is the tower."""


def find_parts(model: nn.Module) -> Parts:
    """Find the vision tower of a model.

    Raises:
        BackboneError: The model has no tower, or more than one, or the tower is not a plain stack of layers.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"{name} is a part of a transformers model. Wrap the complete model (a PreTrainedModel). {SUPPORTED}"
        )
    if hasattr(model, "timm_model"):
        raise BackboneError(f"{name} contains a timm model: wrap that, wrap(model.timm_model).")
    towers = [module for module in model.modules() if _takes_pixels(module)]
    if not towers:
        raise BackboneError(f"{name} has no part that takes pixel_values alone, so it contains no ViT. {SUPPORTED}")
    plain = [tower for tower in towers if len(_stacks(tower)) == 1]
    plain = [tower for tower in plain if not any(other is not tower for other in tower.modules() if other in plain)]
    if len(plain) != 1:
        held = max(len(_stacks(tower)) for tower in towers)
        found = {
            0: "no stack of transformer layers with attention",
            1: f"{len(plain)} vision towers: wrap a single tower",
        }.get(held, f"{held} stacks of layers (hierarchical or in several stages); a plain ViT has a single stack")
        raise BackboneError(f"{name} has {found}. {SUPPORTED}")
    tower = plain[0]
    if type(tower).__name__.endswith("Backbone"):
        raise BackboneError(
            f"{type(tower).__name__} returns feature maps, and classification needs a pooled feature. Load the weights "
            "with AutoModel instead."
        )
    heads = tuple(head for head in _HEADS if linear_within(getattr(model, head, None)) is not None)
    driven = model if heads and _takes_pixels(model) else tower
    return Parts(tower, _stacks(tower)[0], driven, heads if driven is model else ())


def linear_within(module: Any) -> nn.Linear | None:
    """Return a linear layer, also from inside PEFT's wrappers (modules_to_save, LoRA); None for other modules."""
    while not isinstance(module, nn.Linear):
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            return None
        module = inner
    return module


def _takes_pixels(module: nn.Module) -> bool:
    """Whether a module has a config and takes images or video frames first; models with text take text first."""
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return False
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return first.startswith("pixel_values")


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """Lists of layers in a model, all with attention."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 0]
    return [part for part in lists if all(attentions_of(layer) for layer in part)]


def attention_config(layer: nn.Module) -> Any:
    """Return the config object (PreTrainedConfig) that a layer's parts hold, or None."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((config for config in configs if isinstance(config, PreTrainedConfig)), None)
