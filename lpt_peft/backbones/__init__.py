"""The Vision Transformers that the adapter can drive.

`detect.py` finds the driver of a model. One file or folder per library holds the drivers: `timm`, `transformers`,
`torchvision`, `open_clip`, `peft`, and `bundled`, the ViT that this package ships.
"""

from lpt_peft.backbones.base import Backbone, BackboneInfo, Stream
from lpt_peft.backbones.detect import find_backbone

__all__ = ["Backbone", "BackboneInfo", "Stream", "find_backbone"]
