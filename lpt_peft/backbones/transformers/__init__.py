"""transformers' vision encoders: finding the tower, driving it, describing it, loading it by name."""

from lpt_peft.backbones.transformers.vit import TransformersViT, open_backbone

__all__ = ["TransformersViT", "open_backbone"]
