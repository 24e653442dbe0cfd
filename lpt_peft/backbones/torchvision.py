"""Backbone for torchvision's VisionTransformer: `vit_b_16` to `vit_h_14`, with a patch or a convolutional stem.

There is no activation checkpointing, because torchvision has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, VisionTransformer

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream, refuse_offloaded, run_plain, warn_of_multihead_lora
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import Prompt, attach_blocks, detach_blocks, run_block

# (patch size, blocks, heads, width, MLP width) -> torchvision's name
_NAMES = {
    (16, 12, 12, 768, 3072): "vit_b_16",
    (32, 12, 12, 768, 3072): "vit_b_32",
    (16, 24, 16, 1024, 4096): "vit_l_16",
    (32, 24, 16, 1024, 4096): "vit_l_32",
    (14, 32, 16, 1280, 5120): "vit_h_14",
}


def open_backbone(model: nn.Module) -> TorchvisionBackbone:
    """Return the driver for a torchvision model.

    Raises:
        BackboneError: The model is not a plain ViT; the message gives the reason and alternatives.
    """
    if not isinstance(model, VisionTransformer):
        raise BackboneError(
            f"torchvision's {type(model).__name__} cannot take prompts: {_reason(model)}. Supported: torchvision's "
            'VisionTransformer, for example torchvision.models.vit_b_16(weights="DEFAULT").'
        )
    refuse_offloaded(model)
    for module, known in ((model, VisionTransformer), (model.encoder, Encoder)):
        if type(module).forward is not known.forward:
            raise BackboneError(
                f"{type(module).__name__} overrides {known.__name__}.forward, so the steps from image to feature are "
                f"unknown. Supported: {known.__name__} and subclasses that keep that method."
            )
    return TorchvisionBackbone(model)


class TorchvisionBackbone:
    """`lpt_peft.backbones.base.Backbone` for torchvision.

    The feature is the input of `heads`, (B, d): the class token after the last norm.
    """

    runs_own_forward = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dim: int = model.hidden_dim
        self.feature_dim: int = model.hidden_dim
        # Not `model.num_classes`: the heads may have been replaced.
        linear = [module for module in model.heads.modules() if isinstance(module, nn.Linear)]
        self.num_classes: int = linear[-1].out_features if linear else 0

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        return tuple(self.model.encoder.layers)

    def attach(self) -> None:
        """Let all blocks take prompts and check one block of each kind."""
        attach_blocks(self.blocks, self.dim, hint="Build it with torchvision's EncoderBlock in encoder.layers.")
        warn_of_multihead_lora(self.blocks)

    def detach(self) -> None:
        """Restore the original class of every module."""
        detach_blocks(self.blocks)

    def embed(self, x: Tensor) -> Stream:
        """Compute tokens from images (B, 3, H, W) of the model's `image_size`."""
        vit = self.model
        patches = vit._process_input(x)
        tokens = torch.cat([vit.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return Stream(vit.encoder.dropout(tokens + vit.encoder.pos_embedding), {})

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run blocks from `start`, one per prompt (n, d) or (B, n, d); None: no prompt."""
        tokens = stream.tokens
        for layer, prompt in enumerate(prompts, start):
            tokens = run_block(self.model.encoder.layers[layer], tokens, prompt, checkpointing=False)
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """Return the class token after the last norm, (B, d)."""
        tokens: Tensor = self.model.encoder.ln(stream.tokens)
        return tokens[:, 0]

    def class_token(self, stream: Stream) -> Tensor:
        """Return the class token (B, d)."""
        return stream.tokens[:, 0]

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of the patch tokens."""
        return stream.tokens[:, 1:].mean(1)

    def plain_feature(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feature without prompts."""
        return run_plain(self, *args, **kwargs)

    def info(self) -> BackboneInfo:
        """Return the sizes; torchvision does not record which weights were loaded."""
        vit, depth, heads = self.model, len(self.blocks), self.model.encoder.layers[0].num_heads
        sizes = {
            "patch_size": vit.patch_size,
            "num_layers": depth,
            "num_heads": heads,
            "hidden_dim": vit.hidden_dim,
            "mlp_dim": vit.mlp_dim,
        }
        plain_stem = isinstance(vit.conv_proj, nn.Conv2d)
        name = _NAMES.get(tuple(sizes.values())) if plain_stem and type(vit) is VisionTransformer else None
        return BackboneInfo(
            library="torchvision",
            library_version=torchvision.__version__,
            architecture=name or type(vit).__name__,
            # Arguments of the named builder, or of the class, for these sizes.
            model_args={"image_size": vit.image_size, **({} if name else sizes)},
            embed_dim=self.dim,
            depth=depth,
            num_heads=heads,
            num_parameters=sum(tensor.numel() for tensor in self.frozen_tensors()),
        )

    def preprocess(self) -> dict[str, Any]:
        """Return the ImageNet evaluation of most of torchvision's weights, for the image size of this model.

        The model does not record its weights; SWAG weights resize without cropping, by bicubic interpolation.
        """
        return {
            "input_size": [3, self.model.image_size, self.model.image_size],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "crop_pct": 0.875,  # 224 of 256
            "crop_mode": "center",
        }

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Return the state dict without `heads`."""
        state = self.model.state_dict()
        return list(plain_tensors(value for name, value in state.items() if not name.startswith("heads.")))


def _reason(model: nn.Module) -> str:
    names = {type(module).__name__.lower() for module in model.modules()}
    if not any("attention" in name for name in names):
        return "it has no attention over tokens, so there are no keys and values to add a prompt to"
    return (
        "it is not a single chain of attention over all tokens: they lie in windows, shrink between stages, or are "
        "detections, and a prompt has no place there"
    )
