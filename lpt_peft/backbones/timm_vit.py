"""timm's VisionTransformer as a Backbone: every block class and every pool of `vision_transformer.py`.

Not here: the blocks' forwards (`timm_blocks.py`). Models that override VisionTransformer's own forward
(distilled, for one) are refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lpt_peft.attention import attach, check, detach, run_block
from lpt_peft.backbones.base import BackboneInfo, Stream
from lpt_peft.backbones.timm_blocks import PROMPTED
from lpt_peft.errors import BackboneError

# Arguments that a prompt file may hand to timm.create_model: sizes and switches that fix the weights' meaning.
MODEL_ARGS = frozenset(
    (
        *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        *("class_token", "reg_tokens", "pos_embed", "no_embed_class", "dynamic_img_size", "dynamic_img_pad"),
        *("init_values", "qkv_bias", "qk_norm", "pre_norm", "final_norm", "fc_norm"),
        *("global_pool", "pool_include_prefix"),
    )
)


def open_backbone(model: nn.Module) -> TimmViT:
    """The driver for a timm model.

    Raises:
        BackboneError: The model is not a plain VisionTransformer; the message says what works.
    """
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise BackboneError(
            f"timm's {name} is not a plain VisionTransformer, and prompts have no place in it yet. What works: the "
            'models of timm.models.vision_transformer, for example "vit_base_patch16_224".'
        )
    for method in ("forward_features", "forward_head"):
        if getattr(type(model), method) is not getattr(VisionTransformer, method):
            raise BackboneError(
                f"{name} overrides VisionTransformer.{method}, so its way from image to feature is not known here. "
                "What works: VisionTransformer itself and subclasses that keep that method."
            )
    return TimmViT(model)


class TimmViT:
    """`lpt_peft.backbones.base.Backbone` for `timm.models.vision_transformer.VisionTransformer`."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.dim: int = model.embed_dim
        self.feature_dim: int = model.num_features
        self.num_classes: int = model.num_classes

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        return tuple(self.model.blocks)

    def attach(self) -> None:
        """Swap the classes of blocks and attentions, then check one block of each class."""
        modules = [module for block in self.blocks for module in _prompt_sites(block)]
        for module in modules:
            if type(module) not in PROMPTED.keys() | set(PROMPTED.values()):
                known = ", ".join(sorted(cls.__name__ for cls in PROMPTED))
                raise BackboneError(
                    f"{type(module).__name__} of {type(module).__module__} cannot take prompts; timm's {known} can. "
                    "Build the ViT with one of these (block_fn=, attn_layer=)."
                )
        attached: list[nn.Module] = []
        try:
            for module in modules:
                # An attached module is handed on as it is: attach() says whose it is.
                attach(module, PROMPTED.get(type(module), type(module)))
                attached.append(module)
            for block in {_signature(block): block for block in self.blocks}.values():
                check(block, self.dim)
        except BackboneError:
            for module in attached:
                detach(module)
            raise

    def detach(self) -> None:
        """Give every block and attention its original class back."""
        for block in self.blocks:
            for module in _prompt_sites(block):
                detach(module)

    def embed(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Stream:
        """Images (B, 3, H, W) float to the tokens that enter block 1; masks as in VisionTransformer.forward."""
        vit = self.model
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        masked = attn_mask is not None or is_causal
        return Stream(tokens, {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {})

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Blocks from `start` on, one for each prompt (n, d) or (B, n, d)."""
        tokens = stream.tokens
        for block, prompt in zip(self.model.blocks[start : start + len(prompts)], prompts, strict=True):
            tokens = run_block(block, tokens, prompt, checkpointing=self.model.grad_checkpointing, **stream.context)
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """What the model's own head would see (B, d), without dropout; CLS or token mean where it pools nothing."""
        vit = self.model
        pooled: Tensor = vit.fc_norm(vit.pool(vit.norm(stream.tokens)))
        if pooled.ndim == 3:  # global_pool=""
            pooled = pooled[:, 0] if vit.has_class_token else pooled.mean(1)
        return pooled

    def info(self) -> BackboneInfo:
        """What timm recorded when it built the model."""
        vit = self.model
        cfg: dict[str, Any] = getattr(vit, "pretrained_cfg", None) or {}
        recorded: dict[str, Any] = getattr(vit, "_model_args", {})
        return BackboneInfo(
            library="timm",
            library_version=timm.__version__,
            architecture=cfg.get("architecture") or type(vit).__name__,
            pretrained_tag=cfg.get("tag") or None,
            hub_id=cfg.get("hf_hub_id") or None,
            model_args={
                key: list(value) if isinstance(value, tuple) else value
                for key, value in sorted(recorded.items())
                if key in MODEL_ARGS and isinstance(value, (bool, int, float, str, list, tuple))
            },
            embed_dim=self.dim,
            depth=len(vit.blocks),
            num_heads=_num_heads(vit.blocks[0]),
            num_parameters=sum(tensor.numel() for tensor in self.frozen_tensors()),
        )

    def preprocess(self) -> dict[str, Any]:
        """The data configuration (timm) of this model, with the image size it was built for."""
        config = resolve_model_data_config(self.model)
        size = getattr(self.model.patch_embed, "img_size", None) or config["input_size"][1:]
        return {
            "input_size": [self.model.in_chans, *size],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": float(config["crop_pct"]),
            "crop_mode": config["crop_mode"],
        }

    def frozen_tensors(self) -> Iterable[Tensor]:
        """The state dict without `head.*`."""
        return [tensor for name, tensor in self.model.state_dict().items() if not name.startswith("head.")]


def _prompt_sites(block: Any) -> Iterator[nn.Module]:
    """The modules of a block that must change class: itself, and its attentions where they are modules."""
    yield block
    if hasattr(block, "attns"):
        for branch in block.attns:
            yield branch.attn
    elif hasattr(block, "attn"):
        yield block.attn


def _signature(block: nn.Module) -> tuple[type, ...]:
    return tuple(type(module) for module in _prompt_sites(block))


def _num_heads(block: nn.Module) -> int:
    """Heads of a block's (first) attention."""
    attention: Any = list(_prompt_sites(block))[-1]
    return int(attention.num_heads)
