"""Backbone for transformers' vision encoders: find the tower, run it, describe it, load it by name."""

from lpt_peft.backbones.transformers.vit import TransformersViT, open_backbone

__all__ = ["TransformersViT", "open_backbone"]
