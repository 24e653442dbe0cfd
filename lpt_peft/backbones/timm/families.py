"""Families of timm's ViTs: from forward arguments to tokens, and from tokens to the feature.

Each class repeats the few lines before and after the blocks in the model's own forward; tests compare every model with
`forward_head(forward_features(x), pre_logits=True)`. Not here: the code that families share (`vit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lpt_peft.backbones.base import Stream, refuse_offloaded
from lpt_peft.backbones.timm.refusals import reason
from lpt_peft.backbones.timm.vit import TimmBackbone
from lpt_peft.errors import BackboneError, InputError


def open_backbone(model: nn.Module) -> TimmBackbone:
    """Return the driver for a timm model.

    Raises:
        BackboneError: The model is not a plain ViT; the message gives the reason and alternatives.
    """
    # timm's features_only=True wraps a plain ViT into a module that returns feature maps.
    vit: Any = model.model if type(model).__name__ == "FeatureGetterNet" else model
    for cls in type(vit).__mro__:
        if (family := FAMILIES.get(f"{cls.__module__}.{cls.__name__}")) is not None:
            refuse_offloaded(vit)
            for method in family.restated:
                replaced = method in vars(vit)
                if replaced or getattr(type(vit), method) is not getattr(cls, method):
                    how = f"has {method} replaced on the object" if replaced else f"overrides {cls.__name__}.{method}"
                    raise BackboneError(
                        f"{type(vit).__name__} {how}, so the steps from image to feature are unknown. Supported: "
                        f"{cls.__name__} and subclasses that keep that method."
                    )
            if missing := [method for method in family.needs if not hasattr(vit, method)]:
                raise BackboneError(
                    f"{cls.__name__} of timm {timm.__version__} has no {missing[0]}, which prompts need; later "
                    "versions have it. Upgrade timm (pip install -U timm)."
                )
            backbone = family(vit)
            backbone.model = model
            return backbone
    raise BackboneError(reason(vit))


class PlainViT(TimmBackbone):
    """ViT, DeiT 3, hybrid (convolutional stem), ViTamin, FlexiViT, SigLIP, DINOv2: `VisionTransformer`."""

    def embed(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Stream:
        """Compute tokens from images (B, 3, H, W); masks as in VisionTransformer.forward."""
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        masked = attn_mask is not None or is_causal
        return _same_for_all(self, tokens, {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {})

    def feature(self, stream: Stream) -> Tensor:
        """Apply norm, pool and fc_norm."""
        return self.vit.fc_norm(self.vit.pool(self.vit.norm(stream.tokens)))


class DistilledViT(PlainViT):
    """DeiT with a distillation token; the feature is the mean of both tokens, as the logits of both heads are."""

    def feature(self, stream: Stream) -> Tensor:
        """Average class and distillation token."""
        return self.vit.norm(stream.tokens)[:, :2].mean(1)


class _TokenOrMeanViT(TimmBackbone):
    """Pooling of BEiT, the relpos ViTs and early versions of Eva."""

    def feature(self, stream: Stream) -> Tensor:
        """Apply norm, take CLS or the mean of the patches, and apply fc_norm."""
        vit, tokens = self.vit, self.vit.norm(stream.tokens)
        if vit.global_pool:
            tokens = tokens[:, vit.num_prefix_tokens :].mean(1) if vit.global_pool == "avg" else tokens[:, 0]
        return vit.fc_norm(tokens)


class EvaViT(_TokenOrMeanViT):
    """EVA-02, DINOv3, Perception Encoder, ViT with RoPE, Sapiens 2: `Eva`."""

    def embed(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Stream:
        """Compute tokens and the rotary embedding, or an embedding per block, from images (B, 3, H, W)."""
        vit = self.vit
        tokens, rope = vit._pos_embed(vit.patch_embed(images))
        if hasattr(vit, "norm_pre"):  # timm 1.0.16
            tokens = vit.norm_pre(tokens)
        # Blocks of timm before 1.0.26 take no is_causal.
        masked = attn_mask is not None or is_causal
        common: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}
        if getattr(vit, "rope_mixed", False) and rope is not None:
            return Stream(tokens, {"blocks": [{**common, "rope": table} for table in rope]})
        return _same_for_all(self, tokens, {**common, "rope": rope})

    def feature(self, stream: Stream) -> Tensor:
        """Apply norm, pool and fc_norm."""
        if not hasattr(self.vit, "pool"):  # before timm 1.0.16
            return super().feature(stream)
        return self.vit.fc_norm(self.vit.pool(self.vit.norm(stream.tokens)))


class BeitViT(_TokenOrMeanViT):
    """BEiT and BEiT v2."""

    def embed(self, images: Tensor) -> Stream:
        """Compute tokens, and the bias that blocks share, from images (B, 3, H, W)."""
        vit = self.vit
        patches = vit.patch_embed(images)
        tokens = torch.cat((vit.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        tokens = vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)
        bias = None if vit.rel_pos_bias is None else vit.rel_pos_bias()
        return _same_for_all(self, tokens, {"shared_rel_pos_bias": bias})


class RelPosViT(_TokenOrMeanViT):
    """ViT with relative position bias: `VisionTransformerRelPos`."""

    def embed(self, images: Tensor) -> Stream:
        """Compute tokens, and the bias that blocks share, from images (B, 3, H, W)."""
        vit = self.vit
        tokens = vit.patch_embed(images)
        if vit.cls_token is not None:
            tokens = torch.cat((vit.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        bias = None if vit.shared_rel_pos is None else vit.shared_rel_pos.get_bias()
        return _same_for_all(self, tokens, {"shared_rel_pos": bias})


class NaFlexViT(TimmBackbone):
    """ViT for images of any size and shape, padded to a batch: `NaFlexVit`."""

    needs = ("_forward_embeds",)  # timm 1.0.18

    def embed(
        self,
        x: Tensor | Mapping[str, Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Stream:
        """Compute tokens from images (B, 3, H, W), or from patches with coordinates and validity.

        Raises:
            InputError: Patches without coordinates or validity.
        """
        vit = self.vit
        padded = isinstance(x, Mapping) or patch_coord is not None
        if isinstance(x, Mapping):
            patch_coord, patch_valid = x.get("patch_coord", patch_coord), x.get("patch_valid", patch_valid)
            attn_mask, x = x.get("attn_mask", attn_mask), x["patches"]
        if padded and (patch_coord is None or patch_valid is None):
            raise InputError("Patches of NaFlexVit need patch_coord (B, N, 2) and patch_valid (B, N): give both.")
        if not padded:
            patch_valid = attn_mask = None  # images have no masks, as in timm
        made = vit._forward_embeds(x, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask)
        tokens, rope, kept = made["patches"], made["rope_embeds"], made["keep_indices"]
        common = {"attn_mask": made["attn_mask"]}
        if rope is None:
            blocks = [common] * len(vit.blocks)
        elif not vit.rope_is_mixed:
            blocks = [{**common, "rope": rope}] * len(vit.blocks)
        else:
            each = list(rope)
            if kept is not None:
                from timm.layers import apply_keep_indices_nlc  # noqa: PLC0415 - not in every timm

                each = [apply_keep_indices_nlc(tokens, table, kept, pos_embed_has_batch=padded) for table in each]
            blocks = [{**common, "rope": table} for table in each]
        return Stream(tokens, {"blocks": blocks, "patch_valid": made["patch_valid"]})

    def feature(self, stream: Stream) -> Tensor:
        """Apply norm, pool over valid patches, and apply fc_norm."""
        vit = self.vit
        return vit.fc_norm(vit._pool(vit.norm(stream.tokens), patch_valid=stream.context["patch_valid"]))

    def valid_patches(self, stream: Stream) -> Tensor | None:
        """Return which patches (B, N) are not padding; None if all are."""
        return stream.context["patch_valid"]


class _EncoderViT(TimmBackbone):
    """Vision encoders of language models: a classifier around an encoder, or the encoder alone."""

    restated = ("forward",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.feature_dim = model.num_features


class GridViT(_EncoderViT):
    """Qwen 3 and DeepSeek: tokens form a grid, which a merger may shrink."""

    def embed(self, images: Tensor) -> Stream:
        """Compute tokens and the rotary embedding from images (B, 3, H, W)."""
        grid = self.vit.patch_embed(images)
        tokens, rope = self.vit._pos_embed(grid)
        stream = _same_for_all(self, tokens, {"rope": rope})
        return Stream(stream.tokens, {**stream.context, "grid": grid.shape[1:3]})

    def feature(self, stream: Stream) -> Tensor:
        """Merge tokens if the classifier has a merger, average them and apply its norm."""
        vit, model = self.vit, self.classifier
        tokens = stream.tokens if not hasattr(vit, "norm") else vit.norm(stream.tokens)
        grid = tokens.unflatten(1, stream.context["grid"])
        if vit is model:
            return grid
        merge = getattr(vit, "merger", None) or getattr(vit, "aligner", None)
        tokens = (grid if merge is None else merge(grid)).flatten(1, -2)
        return model.norm(tokens.mean(1) if model.global_pool == "avg" else tokens)


class Gemma4ViT(_EncoderViT):
    """Gemma 4: images, or patches with coordinates and validity."""

    def embed(
        self,
        x: Tensor | Mapping[str, Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
    ) -> Stream:
        """Compute tokens from images (B, 3, H, W) or padded patches, as in Gemma4VitClassifier.forward."""
        vit = self.vit
        if isinstance(x, Mapping):
            patch_coord, patch_valid = x.get("patch_coord", patch_coord), x.get("patch_valid", patch_valid)
            x = x["patches"]
        vit._assert_raw_img_conformant(x)
        tokens, position, padding = vit.patch_embed(x, patch_coord, patch_valid)
        cos, sin = vit.rotary_emb(tokens, position)
        mask = None
        if padding is not None:
            mask = torch.zeros_like(padding, dtype=tokens.dtype).masked_fill(padding, float("-inf"))[:, None, None]
        stream = _same_for_all(self, tokens, {"rope_cos": cos, "rope_sin": sin, "attn_mask": mask})
        return Stream(tokens, {**stream.context, "position": position, "padding": padding})

    def feature(self, stream: Stream) -> Tensor:
        """Average the valid tokens, or those of the encoder's pooler, and apply the classifier's norm."""
        vit, model, tokens, padding = self.vit, self.classifier, stream.tokens, stream.context["padding"]
        if vit is not model and vit.global_pool == "soft":
            tokens, _ = vit.pooler(tokens, stream.context["position"], padding)
            tokens = tokens if vit.std_bias is None else (tokens - vit.std_bias) * vit.std_scale
            padding = None
        if padding is not None:
            valid = (~padding).unsqueeze(-1)
            mean = tokens.masked_fill(~valid, 0.0).sum(1) / valid.sum(1).clamp(min=1)
        else:
            mean = tokens.mean(1)
        return mean if vit is model else model.norm(mean)

    def valid_patches(self, stream: Stream) -> Tensor | None:
        """Return which patches (B, N) are not padding; None if all are."""
        padding = stream.context["padding"]
        return None if padding is None else ~padding


def _same_for_all(backbone: TimmBackbone, tokens: Tensor, arguments: dict[str, Any]) -> Stream:
    return Stream(tokens, {"blocks": [arguments] * len(backbone.vit.blocks)})


# By qualified class name: an installed timm may lack some of these modules.
FAMILIES: dict[str, type[TimmBackbone]] = {
    f"timm.models.{name}": family
    for family, names in {
        DistilledViT: ["deit.VisionTransformerDistilled"],
        PlainViT: ["vision_transformer.VisionTransformer"],
        EvaViT: ["eva.Eva"],
        BeitViT: ["beit.Beit"],
        RelPosViT: ["vision_transformer_relpos.VisionTransformerRelPos"],
        NaFlexViT: ["naflexvit.NaFlexVit"],
        GridViT: [
            *("qwen3_vit.Qwen3VitClassifier", "qwen3_vit.Qwen3VitEncoder"),
            *("deepseek_vit.DeepseekVitClassifier", "deepseek_vit.DeepseekVitEncoder"),
        ],
        Gemma4ViT: ["gemma4_vit.Gemma4VitClassifier", "gemma4_vit.Gemma4VitEncoder"],
    }.items()
    for name in names
}
