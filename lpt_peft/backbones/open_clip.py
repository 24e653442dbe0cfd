"""open_clip's visual towers as Backbones: the native VisionTransformer, and timm's ViTs inside a TimmModel.

The model is a whole CLIP, CustomTextCLIP or CoCa, or a bare tower. Only the visual tower is driven: the text
tower, whose blocks are of the same classes, is left alone. The feature is what the visual tower answers, behind
its projection, not normalised. Not here: how a block takes prompts (`lpt_peft.prompting`), and timm's ViTs
(`timm/families.py`).
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
from lpt_peft.backbones.base import BackboneInfo, Stream, refuse_offloaded, warn_of_multihead_lora
from lpt_peft.backbones.detect import find_backbone
from lpt_peft.errors import BackboneError
from lpt_peft.prompting import attach_blocks, batched, detach_blocks, run_block

_CROP_MODE = {"shortest": "center", "longest": "border", "squash": "squash"}  # open_clip's word -> timm's
_NEAREST = 'a CLIP whose visual tower is a plain ViT, for example open_clip.create_model("ViT-B-32")'


def open_backbone(model: nn.Module) -> NativeTower | TimmTower:
    """The driver for a model with a visual tower, or for a bare visual tower.

    Raises:
        BackboneError: The tower is not a plain ViT; the message says why, and what works.
    """
    tower: Any = getattr(model, "visual", model)
    refuse_offloaded(tower)
    if isinstance(tower, TimmModel):
        _refuse_override(tower, TimmModel)
        return TimmTower(model, tower)
    if not isinstance(tower, VisionTransformer):
        why = "it is not a visual tower that turns images into one chain of tokens"
        if isinstance(tower, ModifiedResNet):
            why = "it is a convolutional network, whose one attention only pools, so no block has keys and values"
        raise BackboneError(f"open_clip's {type(tower).__name__} cannot take prompts: {why}. What works: {_NEAREST}.")
    _refuse_override(tower, VisionTransformer)
    _refuse_override(tower.transformer, Transformer, CustomTransformer)
    return NativeTower(model, tower)


class _Tower:
    """What both towers do alike: all that concerns the tower as a whole."""

    runs_own_forward = False
    num_classes = 0  # an image encoder: wrap() must be told

    def __init__(self, model: nn.Module, tower: Any) -> None:
        self.model = model
        self.tower = tower

    def preprocess(self) -> dict[str, Any]:
        """What open_clip recorded on the tower, or its defaults, with the image size of this tower."""
        config = {**asdict(PreprocessCfg()), **get_model_preprocess_cfg(self.tower)}
        return {
            "input_size": [3, *self.tower.image_size],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": _CROP_MODE[config["resize_mode"]],
        }

    def frozen_tensors(self) -> Iterable[Tensor]:
        """The state dict of the visual tower; the text tower has no part in the feature."""
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
        """Swap the classes of blocks and attentions, then check one block of each kind."""
        attach_blocks(self.blocks, self.dim, hint="Build the tower with open_clip's own blocks.")
        warn_of_multihead_lora(self.blocks)

    def detach(self) -> None:
        """Give every block and attention its original class back."""
        detach_blocks(self.blocks)

    def embed(self, image: Tensor) -> Stream:
        """Images (B, 3, H, W) float to the tokens that enter block 1; patches are dropped as the tower is set."""
        return Stream(self.tower._embeds(image), {})

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Blocks from `start` on, one for each prompt (n, d) or (B, n, d); `stream` is always batch first."""
        transformer = self.tower.transformer
        turned = not getattr(transformer, "batch_first", True)
        tokens = stream.tokens.transpose(0, 1) if turned else stream.tokens
        for layer, prompt in enumerate(prompts, start):
            prompt = batched(prompt)  # noqa: PLW2901
            tokens = run_block(
                transformer.resblocks[layer],
                tokens,
                prompt.transpose(0, 1) if turned else prompt,
                checkpointing=transformer.grad_checkpointing,
            )
        return Stream(tokens.transpose(0, 1) if turned else tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """The tower's output (B, feature_dim); its first token, CLS or first query, where it pools nothing."""
        pooled, _ = self.tower._pool(stream.tokens)
        if self.tower.proj is not None:
            pooled = pooled @ self.tower.proj
        return pooled if pooled.ndim == 2 else pooled[:, 0]

    def info(self) -> BackboneInfo:
        """What the sizes tell; open_clip records neither the name of a configuration nor the weights' tag."""
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
    """`lpt_peft.backbones.base.Backbone` for a TimmModel: timm's driver, and the projection behind it."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        super().__init__(model, tower)
        try:
            self.trunk = find_backbone(tower.trunk)
        except BackboneError as error:
            raise BackboneError(f"This open_clip tower holds a timm model. {error} Or {_NEAREST}.") from error
        if tower.trunk.num_classes and not isinstance(tower.trunk.get_classifier(), nn.Module):
            raise BackboneError(
                f"The {type(tower.trunk).__name__} in this open_clip tower projects two tokens by two heads, so their "
                f'mean does not tell its feature. What works: TimmModel(..., proj="linear"), or {_NEAREST}.'
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
        """How the trunk pools its tokens."""
        return getattr(self.trunk, "pooling", "")

    def attach(self) -> None:
        """Let the trunk's blocks take prompts."""
        self.trunk.attach()

    def detach(self) -> None:
        """Give every module of the trunk its original class back."""
        self.trunk.detach()

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """Images (B, 3, H, W) float to the tokens that enter block 1."""
        return self.trunk.embed(*args, **kwargs)

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Blocks from `start` on, one for each prompt (n, d) or (B, n, d)."""
        return self.trunk.run(stream, start, prompts)

    def pool(self, stream: Stream) -> Tensor:
        """The tower's output (B, feature_dim), without dropout."""
        feature = self.trunk.pool(stream)
        for module in self._projection():
            feature = module(feature)
        return feature

    def info(self) -> BackboneInfo:
        """The trunk's architecture as timm recorded it; the weights' tag is not recorded."""
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
        """What stands between the trunk's pooled feature and the tower's output, dropout left out."""
        trunk = self.tower.trunk
        parts = [*([trunk.get_classifier()] if trunk.num_classes else []), *self.tower.head]
        parts = [part for whole in parts for part in (whole.children() if isinstance(whole, Mlp) else [whole])]
        return [part for part in parts if not isinstance(part, nn.Dropout)]


def _refuse_override(module: nn.Module, *known: type[nn.Module]) -> None:
    """The steps of `forward` are restated here: they must be those of one of the known classes."""
    if type(module).forward not in [cls.forward for cls in known]:
        name = known[0].__name__
        raise BackboneError(
            f"{type(module).__name__} overrides {name}.forward, so its way from image to feature is not known here. "
            f"What works: open_clip's {name} itself and subclasses that keep that method."
        )
