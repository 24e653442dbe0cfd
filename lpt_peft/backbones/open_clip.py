"""Backbones for open_clip's visual towers: the native VisionTransformer, and timm's ViTs inside a TimmModel.

The model is a CLIP, CustomTextCLIP, CoCa or a visual tower. Prompts enter the visual tower only, although blocks of the
text tower have the same classes. The feature is the output of the visual tower after its projection, not normalized.
Not here: timm's ViTs (`lpt_peft/backbones/timm`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import open_clip
from open_clip.model import get_model_preprocess_cfg
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import CustomTransformer, Transformer, VisionTransformer
from timm.layers import Mlp
from torch import Tensor, nn

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream, refuse_offloaded, run_plain, warn_of_multihead_lora
from lpt_peft.backbones.detect import find_backbone
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import Prompt, attach_blocks, batched, detach_blocks, run_block

_CROP_MODE = {"shortest": "center", "longest": "border", "squash": "squash"}  # open_clip's name -> timm's
_ALTERNATIVE = 'a CLIP whose visual tower is a plain ViT, for example open_clip.create_model("ViT-B-32")'


def open_backbone(model: nn.Module) -> NativeTower | TimmTower:
    """Return the driver for a model with a visual tower, or for a visual tower.

    Raises:
        BackboneError: The tower is not a plain ViT; the message gives the reason and alternatives.
    """
    tower: Any = getattr(model, "visual", model)
    refuse_offloaded(tower)
    if isinstance(tower, TimmModel):
        _refuse_override(tower, TimmModel)
        return TimmTower(model, tower)
    if not isinstance(tower, VisionTransformer):
        why = "it is not a visual tower that turns images into a sequence of tokens"
        if isinstance(tower, ModifiedResNet):
            why = "it is a convolutional network, whose only attention pools, so no block has keys and values"
        raise BackboneError(
            f"open_clip's {type(tower).__name__} cannot take prompts: {why}. Supported: {_ALTERNATIVE}."
        )
    _refuse_override(tower, VisionTransformer)
    _refuse_override(tower.transformer, Transformer, CustomTransformer)
    return NativeTower(model, tower)


class _Tower:
    """Code that both kinds of tower share."""

    runs_own_forward = False
    num_classes = 0  # an image encoder: wrap() needs num_classes=

    def __init__(self, model: nn.Module, tower: Any) -> None:
        self.model = model
        self.tower = tower

    def preprocess(self) -> dict[str, Any]:
        """Return what open_clip recorded on the tower, or its defaults, with the image size of this tower."""
        config = {**asdict(PreprocessCfg()), **get_model_preprocess_cfg(self.tower)}
        return {
            "input_size": [3, *self.tower.image_size],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": _CROP_MODE[config["resize_mode"]],
        }

    def plain_feature(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feature without prompts."""
        return run_plain(self, *args, **kwargs)

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Return the state dict of the visual tower; the text tower does not affect the feature."""
        return list(plain_tensors(self.tower.state_dict().values()))


class NativeTower(_Tower):
    """`lpt_peft.backbones.base.Backbone` for open_clip's own VisionTransformer."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        super().__init__(model, tower)
        self.dim: int = tower.transformer.width
        pooled = self.dim if tower.attn_pool is None else tower.output_dim
        self.feature_dim: int = pooled if tower.proj is None else tower.proj.shape[1]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks of the visual tower, in order."""
        return tuple(self.tower.transformer.resblocks)

    def attach(self) -> None:
        """Let all blocks take prompts and check one block of each kind."""
        attach_blocks(self.blocks, self.dim, hint="Build the tower with open_clip's own blocks.")
        warn_of_multihead_lora(self.blocks)

    def detach(self) -> None:
        """Restore the original class of every module."""
        detach_blocks(self.blocks)

    def embed(self, image: Tensor) -> Stream:
        """Compute tokens from images (B, 3, H, W), with the tower's patch dropout."""
        return Stream(self.tower._embeds(image), {})

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run blocks from `start`, one per prompt (n, d) or (B, n, d), None: no prompt; `stream` is batch first."""
        transformer = self.tower.transformer
        transposed = not getattr(transformer, "batch_first", True)
        tokens = stream.tokens.transpose(0, 1) if transposed else stream.tokens
        for layer, prompt in enumerate(prompts, start):
            if isinstance(prompt, Tensor):
                prompt = batched(prompt).transpose(0, 1) if transposed else prompt  # noqa: PLW2901
            tokens = run_block(
                transformer.resblocks[layer],
                tokens,
                prompt,
                checkpointing=transformer.grad_checkpointing,
            )
        return Stream(tokens.transpose(0, 1) if transposed else tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """Compute the tower's output (B, feature_dim); its first token (CLS or first query) if it does not pool."""
        pooled, _ = self.tower._pool(stream.tokens)
        if self.tower.proj is not None:
            pooled = pooled @ self.tower.proj
        return pooled if pooled.ndim == 2 else pooled[:, 0]

    def class_token(self, stream: Stream) -> Tensor:
        """Return the class token (B, d)."""
        return stream.tokens[:, 0]

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of the patch tokens."""
        return stream.tokens[:, 1:].mean(1)

    def info(self) -> BackboneInfo:
        """Return the sizes; open_clip records neither the name of the model nor the tag of its weights."""
        tower = self.tower
        block: Any = self.blocks[0]
        return BackboneInfo(
            library="open_clip",
            library_version=open_clip.__version__,
            architecture=type(tower).__name__,
            model_args={
                "image_size": list(tower.image_size),
                "patch_size": list(tower.patch_size),
                "output_dim": tower.output_dim,
            },
            embed_dim=self.dim,
            depth=len(self.blocks),
            num_heads=block.attn.num_heads,
            num_parameters=sum(tensor.numel() for tensor in self.frozen_tensors()),
        )


class TimmTower(_Tower):
    """`lpt_peft.backbones.base.Backbone` for a TimmModel: timm's driver and the projection after it."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        super().__init__(model, tower)
        try:
            self.trunk = find_backbone(tower.trunk)
        except BackboneError as error:
            raise BackboneError(f"This open_clip tower holds a timm model. {error} Or {_ALTERNATIVE}.") from error
        if tower.trunk.num_classes and not isinstance(tower.trunk.get_classifier(), nn.Module):
            raise BackboneError(
                f"The {type(tower.trunk).__name__} in this open_clip tower projects two tokens by two heads, so its "
                f'feature is not the mean of both. Supported: TimmModel(..., proj="linear"), or {_ALTERNATIVE}.'
            )
        self.dim = self.trunk.dim
        linear = [part for module in self._projection() for part in module.modules() if isinstance(part, nn.Linear)]
        self.feature_dim: int = linear[-1].out_features if linear else self.trunk.feature_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks of the trunk, in order."""
        return self.trunk.blocks

    @property
    def pooling(self) -> str:
        """Kind of pooling of the trunk."""
        return getattr(self.trunk, "pooling", "")

    def attach(self) -> None:
        """Let all blocks of the trunk take prompts."""
        self.trunk.attach()

    def detach(self) -> None:
        """Restore the original class of every module of the trunk."""
        self.trunk.detach()

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """Compute tokens from images (B, 3, H, W)."""
        return self.trunk.embed(*args, **kwargs)

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run blocks from `start`, one per prompt (n, d) or (B, n, d); None: no prompt."""
        return self.trunk.run(stream, start, prompts)

    def pool(self, stream: Stream) -> Tensor:
        """Compute the tower's output (B, feature_dim), without dropout."""
        feature = self.trunk.pool(stream)
        for module in self._projection():
            feature = module(feature)
        return feature

    def class_token(self, stream: Stream) -> Tensor | None:
        """Return the class token (B, d), or None if the trunk has none."""
        return self.trunk.class_token(stream)

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of the patch tokens of the trunk."""
        return self.trunk.mean_patch(stream)

    def info(self) -> BackboneInfo:
        """Return what timm recorded of the trunk; the tag of the weights is not recorded."""
        trunk = self.trunk.info()
        return BackboneInfo(
            library="open_clip",
            library_version=open_clip.__version__,
            architecture=trunk.architecture,
            model_args={"image_size": list(self.tower.image_size), "output_dim": self.feature_dim},
            embed_dim=self.dim,
            depth=len(self.blocks),
            num_heads=trunk.num_heads,
            num_parameters=sum(tensor.numel() for tensor in self.frozen_tensors()),
        )

    def _projection(self) -> list[nn.Module]:
        """Modules between the trunk's pooled feature and the tower's output, without dropout."""
        trunk = self.tower.trunk
        parts = [*([trunk.get_classifier()] if trunk.num_classes else []), *self.tower.head]
        parts = [part for module in parts for part in (module.children() if isinstance(module, Mlp) else [module])]
        return [part for part in parts if not isinstance(part, nn.Dropout)]


def _refuse_override(module: nn.Module, *known: type[nn.Module]) -> None:
    """Refuse a forward that differs from those of the known classes, whose steps the driver follows."""
    if type(module).forward not in [cls.forward for cls in known]:
        name = known[0].__name__
        raise BackboneError(
            f"{type(module).__name__} overrides {name}.forward, so the steps from image to feature are unknown. "
            f"Supported: open_clip's {name} and subclasses that keep that method."
        )
