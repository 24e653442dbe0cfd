"""timm's plain ViTs as a Backbone: what all families do alike, and the choice of the family.

Not here: how each family comes from image to tokens and from tokens to feature (`timm/families.py`), and how a
block takes prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream
from lpt_peft.prompting import attach_blocks, attentions_of, detach_blocks, run_block

# Arguments that a prompt file may hand to timm.create_model: sizes and switches that fix the weights' meaning.
MODEL_ARGS = frozenset(
    (
        *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        *("class_token", "reg_tokens", "pos_embed", "no_embed_class", "dynamic_img_size", "dynamic_img_pad"),
        *("init_values", "qkv_bias", "qk_norm", "pre_norm", "final_norm", "fc_norm"),
        *("global_pool", "pool_include_prefix"),
    )
)


class TimmBackbone:
    """`lpt_peft.backbones.base.Backbone` for timm, up to `embed` and `feature`, which a family adds.

    Attributes:
        model: The user's very object: the classifier, or what wraps it.
        classifier: timm's model.
        vit: The module that holds the blocks: the classifier itself, or the encoder inside it.
    """

    runs_own_forward = False
    restated: ClassVar[tuple[str, ...]] = ("forward", "forward_features", "forward_head")
    """Methods of the model whose steps the family's `embed` and `feature` take: an override of one is refused."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Methods of the model that the family calls and that some supported version of timm lacks: refused there."""

    def __init__(self, model: Any) -> None:
        self.model = self.classifier = model
        self.vit = getattr(model, "encoder", model)
        self.dim: int = self.vit.embed_dim
        self.feature_dim: int = self.dim
        self.num_classes: int = model.num_classes

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        return tuple(self.vit.blocks)

    @property
    def pooling(self) -> str:
        """How tokens become the feature; `reset_classifier(n, pooling)` changes it."""
        return getattr(self.classifier, "global_pool", "")

    def attach(self) -> None:
        """Swap the classes of blocks and attentions, then check one block of each kind."""
        attach_blocks(self.blocks, self.dim, hint="Build the ViT with timm's own classes (block_fn=, attn_layer=).")

    def detach(self) -> None:
        """Give every block and attention its original class back."""
        detach_blocks(self.blocks)

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """The model's forward arguments to tokens; `context["blocks"]` holds the keyword arguments of each block."""
        raise NotImplementedError

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Blocks from `start` on, one for each prompt (n, d) or (B, n, d)."""
        _warn_of_ignored_lora(self.vit.blocks[0])
        tokens = stream.tokens
        for layer, prompt in enumerate(prompts, start):
            arguments = stream.context["blocks"][layer]
            tokens = run_block(
                self.vit.blocks[layer], tokens, prompt, checkpointing=self.vit.grad_checkpointing, **arguments
            )
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """What the model's own head would see (B, d), without dropout; CLS or patch mean where it pools nothing."""
        feature = self.feature(stream)
        if feature.ndim == 2:
            return feature
        if getattr(getattr(self.vit, "embeds", self.vit), "cls_token", None) is not None:
            return feature[:, 0]
        return feature.flatten(1, -2)[:, self.vit.num_prefix_tokens :].mean(1)

    def feature(self, stream: Stream) -> Tensor:
        """`forward_head(norm(tokens), pre_logits=True)` without its dropout: (B, d), or tokens where nothing pools."""
        raise NotImplementedError

    def info(self) -> BackboneInfo:
        """What timm recorded when it built the model."""
        cfg: dict[str, Any] = getattr(self.classifier, "pretrained_cfg", None) or {}
        recorded = _model_args(self.classifier)
        return BackboneInfo(
            library="timm",
            library_version=timm.__version__,
            architecture=cfg.get("architecture") or type(self.classifier).__name__,
            pretrained_tag=cfg.get("tag") or None,
            hub_id=cfg.get("hf_hub_id") or None,
            model_args={
                key: list(value) if isinstance(value, tuple) else value
                for key, value in sorted(recorded.items())
                if key in MODEL_ARGS and isinstance(value, (bool, int, float, str, list, tuple))
            },
            embed_dim=self.dim,
            depth=len(self.blocks),
            num_heads=_num_heads(self.vit.blocks[0]),
            num_parameters=sum(tensor.numel() for tensor in self.frozen_tensors()),
        )

    def preprocess(self) -> dict[str, Any]:
        """The data configuration (timm) of this model, with the image size it was built for."""
        config = resolve_model_data_config(self.classifier)
        size = getattr(getattr(self.vit, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        channels = _model_args(self.classifier).get("in_chans", config["input_size"][0])
        return {
            "input_size": [channels, *size],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": float(config["crop_pct"]),
            "crop_mode": config["crop_mode"],
        }

    def frozen_tensors(self) -> Iterable[Tensor]:
        """The state dict without the classification heads."""
        heads = ("head.", "head_dist.")
        state = self.classifier.state_dict()
        return list(plain_tensors(value for name, value in state.items() if not name.startswith(heads)))


def _model_args(model: Any) -> dict[str, Any]:
    """Arguments that timm recorded when it built the model; before timm 1.0.31, those that can be read off the model.

    Weights alone do not show these arguments: the same tensors serve every pool and many image sizes.
    """
    if (recorded := getattr(model, "_model_args", None)) is not None:
        return dict(recorded)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    embedding: Any = getattr(model, "patch_embed", None)
    found: dict[str, Any] = {name: getattr(model, name, None) for name in ("global_pool", "dynamic_img_size")}
    if found["global_pool"] == "map":  # has weights of its own, which the fingerprint covers
        del found["global_pool"]
    if embedding is not None:
        found |= {name: getattr(embedding, name, None) for name in ("img_size", "dynamic_img_pad")}
        channels = next((weight.shape[1] for weight in embedding.parameters() if weight.ndim == 4), None)
        found["in_chans"] = channels if channels != config.get("input_size", (3,))[0] else None
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _num_heads(block: nn.Module) -> int:
    """Heads of a block's (first) attention, or of the block where attention is written into it."""
    holder: Any = next(iter(attentions_of(block)), block)
    return int(holder.num_heads)


def _warn_of_ignored_lora(block: nn.Module) -> None:
    """Say where timm reads `qkv.weight` directly, past the LoRA that PEFT put around `qkv` (Beit, Eva)."""
    for attention in attentions_of(block):
        reads_weight = getattr(attention, "q_bias", None) is not None and not attention.qkv_bias_separate
        if reads_weight and hasattr(attention.qkv, "base_layer"):
            warnings.warn(
                f"timm's {type(attention).__name__.removeprefix('Prompted')} reads qkv.weight directly, so LoRA on "
                "`qkv` has no effect, with or without prompts. Merge it (merge_and_unload()) or put LoRA on `proj`, "
                "`fc1` and `fc2`.",
                UserWarning,
                stacklevel=2,
            )
