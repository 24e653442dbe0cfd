"""Backbone for timm's plain ViTs: the code that all families share.

Not here: the steps from image to tokens and from tokens to feature (`families.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream, masked_mean, run_plain
from lpt_peft.prompting import Prompt, attach_blocks, attentions_of, detach_blocks, run_block

# Arguments that a prompt file records: sizes and switches that determine what the weights mean.
MODEL_ARGS = frozenset(
    (
        *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        *("class_token", "reg_tokens", "pos_embed", "no_embed_class", "dynamic_img_size", "dynamic_img_pad"),
        *("init_values", "qkv_bias", "qk_norm", "pre_norm", "final_norm", "fc_norm"),
        *("global_pool", "pool_include_prefix"),
    )
)


class TimmBackbone:
    """`lpt_peft.backbones.base.Backbone` for timm; each family adds `embed` and `feature`.

    Attributes:
        model: The user's model: the classifier, or a wrapper around it.
        classifier: timm's model.
        vit: The module that holds the blocks: the classifier, or the encoder inside it.
    """

    runs_own_forward = False
    restated: ClassVar[tuple[str, ...]] = ("forward", "forward_features", "forward_head")
    """Methods of the model that `embed` and `feature` follow; models that override them are refused."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Methods of the model that `embed` calls and that older versions of timm lack."""

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
        """Kind of pooling; `reset_classifier(n, pooling)` changes it."""
        return getattr(self.classifier, "global_pool", "")

    def attach(self) -> None:
        """Let all blocks take prompts and check one block of each kind."""
        attach_blocks(self.blocks, self.dim, hint="Build the ViT with timm's own classes (block_fn=, attn_layer=).")

    def detach(self) -> None:
        """Restore the original class of every module."""
        detach_blocks(self.blocks)

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """Compute tokens from the forward arguments; `context["blocks"]` holds the keyword arguments of each block."""
        raise NotImplementedError

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run blocks from `start`, one per prompt (n, d) or (B, n, d); None: no prompt."""
        _warn_of_ignored_lora(self.vit.blocks[0])
        tokens = stream.tokens
        for layer, prompt in enumerate(prompts, start):
            arguments = stream.context["blocks"][layer]
            tokens = run_block(
                self.vit.blocks[layer], tokens, prompt, checkpointing=self.vit.grad_checkpointing, **arguments
            )
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """Compute the input of the model's classifier (B, d), without dropout; CLS or patch mean if it has no pool."""
        feature = self.feature(stream)
        if feature.ndim == 2:
            return feature
        tokens = Stream(feature.flatten(1, -2), stream.context)
        first = self.class_token(tokens)
        return self.mean_patch(tokens) if first is None else first

    def class_token(self, stream: Stream) -> Tensor | None:
        """Return the class token (B, d), or None if the model has none."""
        embedding = getattr(self.vit, "embeds", self.vit)
        return None if getattr(embedding, "cls_token", None) is None else stream.tokens[:, 0]

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of the patch tokens, without padding."""
        return masked_mean(stream.tokens[:, self.vit.num_prefix_tokens :], self.valid_patches(stream))

    def valid_patches(self, stream: Stream) -> Tensor | None:
        """Return which patches (B, N) are not padding; None if all are."""
        return None

    def plain_feature(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feature without prompts."""
        return run_plain(self, *args, **kwargs)

    def feature(self, stream: Stream) -> Tensor:
        """Compute `forward_head(norm(tokens), pre_logits=True)` without dropout: (B, d), or tokens if not pooled."""
        raise NotImplementedError

    def info(self) -> BackboneInfo:
        """Return what timm recorded when it built the model."""
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
        """Return timm's data configuration of this model, with the image size it was built for."""
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
        """Return the state dict without the classifiers."""
        heads = ("head.", "head_dist.")
        state = self.classifier.state_dict()
        return list(plain_tensors(value for name, value in state.items() if not name.startswith(heads)))


def _model_args(model: Any) -> dict[str, Any]:
    """Arguments that timm recorded when it built the model; before timm 1.0.31, what the model's attributes show.

    Weights do not show them: the same tensors work with every pooling and many image sizes.
    """
    if (recorded := getattr(model, "_model_args", None)) is not None:
        return dict(recorded)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    embedding: Any = getattr(model, "patch_embed", None)
    found: dict[str, Any] = {name: getattr(model, name, None) for name in ("global_pool", "dynamic_img_size")}
    if found["global_pool"] == "map":  # has weights, which are part of the fingerprint
        del found["global_pool"]
    if embedding is not None:
        found |= {name: getattr(embedding, name, None) for name in ("img_size", "dynamic_img_pad")}
        channels = next((weight.shape[1] for weight in embedding.parameters() if weight.ndim == 4), None)
        found["in_chans"] = channels if channels != config.get("input_size", (3,))[0] else None
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _num_heads(block: nn.Module) -> int:
    """Heads of a block's first attention, or of the block if it computes attention itself."""
    holder: Any = next(iter(attentions_of(block)), block)
    return int(holder.num_heads)


def _warn_of_ignored_lora(block: nn.Module) -> None:
    """Warn where timm reads `qkv.weight` directly and ignores PEFT's LoRA on `qkv` (Beit, Eva)."""
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
