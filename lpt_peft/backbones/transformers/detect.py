"""Where the vision tower and its layers are in a transformers model, found by what modules take and hold.

Not here: driving them (`vit.py`) and how a layer takes prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lpt_peft.errors import BackboneError
from lpt_peft.prompting import attentions_of

WORKS = "What works: plain ViTs, for example ViTModel, Dinov2Model, DINOv3ViTModel, CLIPVisionModel, SiglipVisionModel."
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


class Parts(NamedTuple):
    """The parts of a model that the adapter has to do with."""

    tower: Any
    """The vision model: the innermost one that takes pixel values and holds all layers."""
    layers: nn.ModuleList
    driven: Any
    """Whose forward runs: the classification model, with what lies between tower and classifier, or the tower."""
    heads: tuple[str, ...]
    """Names of the linear classifiers of `driven`; none where it is the tower."""


def find_parts(model: nn.Module) -> Parts:
    """Find the vision tower of a model.

    Raises:
        BackboneError: There is none, or more than one, or it is not a plain stack of layers.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"{name} is a part of a transformers model and not a model. Wrap the whole one (a PreTrainedModel). {WORKS}"
        )
    if hasattr(model, "timm_model"):
        raise BackboneError(f"{name} is a shell around a timm model: wrap(model.timm_model) gives that one prompts.")
    towers = [module for module in model.modules() if _takes_pixels(module)]
    if not towers:
        raise BackboneError(f"{name} has no part that takes pixel_values alone, so no ViT to give prompts to. {WORKS}")
    plain = [tower for tower in towers if len(_stacks(tower)) == 1]
    plain = [tower for tower in plain if not any(other is not tower for other in tower.modules() if other in plain)]
    if len(plain) != 1:
        held = max(len(_stacks(tower)) for tower in towers)
        found = {
            0: "no stack of transformer layers with an attention of their own",
            1: f"{len(plain)} vision towers: wrap one of them",
        }.get(held, f"{held} stacks of layers (hierarchical or in several stages), where a plain ViT has one")
        raise BackboneError(f"{name} has {found}. {WORKS}")
    tower = plain[0]
    if type(tower).__name__.endswith("Backbone"):
        raise BackboneError(
            f"{type(tower).__name__} gives feature maps, and no pooled feature to classify by. Load the same weights "
            "with AutoModel instead."
        )
    heads = tuple(head for head in _HEADS if linear_within(getattr(model, head, None)) is not None)
    driven = model if heads and _takes_pixels(model) else tower
    return Parts(tower, _stacks(tower)[0], driven, heads if driven is model else ())


def linear_within(module: Any) -> nn.Linear | None:
    """A linear layer itself, or the one that PEFT put a wrapper around (modules_to_save, LoRA)."""
    while not isinstance(module, nn.Linear):
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            return None
        module = inner
    return module


def _takes_pixels(module: nn.Module) -> bool:
    """A part with a config whose first argument is images or video frames; models that take text take it first."""
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return False
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return first.startswith("pixel_values")


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers in a model, each layer with attention of its own."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 0]
    return [part for part in lists if all(attentions_of(layer) for layer in part)]


def attention_config(layer: nn.Module) -> Any:
    """The config object (PreTrainedConfig) that a layer's parts hold; None where none does."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((config for config in configs if isinstance(config, PreTrainedConfig)), None)
