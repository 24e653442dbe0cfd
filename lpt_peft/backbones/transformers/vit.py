"""Backbone for transformers' vision encoders, through the model's own forward.

No forward is copied: the layers record their arguments (`embed`), run with prompts (`run`), and return the final tokens
for the model to normalize and pool (`pool`). All arguments work: pixel masks, spatial shapes, position interpolation.
Not here: finding tower and layers (`detect.py`), and the description for prompt files (`info.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream, masked_mean, not_floating
from lpt_peft.backbones.transformers.detect import SUPPORTED, Parts, attention_config, find_parts, linear_within
from lpt_peft.backbones.transformers.info import info, preprocess
from lpt_peft.errors import BackboneError, InputError
from lpt_peft.prompting import (
    Prompt,
    Recorder,
    attach_blocks,
    detach_blocks,
    pass_through,
    prompt_arguments,
    recording,
)

_CLS_NAMES = frozenset(("cls_token", "class_embedding", "class_token", "cls_embedding", "cls_register_token"))


def open_backbone(model: nn.Module) -> TransformersViT:
    """Return the driver for a transformers model; of a model with a text tower, for its vision tower.

    Raises:
        BackboneError: It contains no plain ViT; the message gives the reason and alternatives.
    """
    return TransformersViT(model, find_parts(model))


class TransformersViT:
    """`lpt_peft.backbones.base.Backbone` for vision encoders of transformers.

    The feature of a classification model is the input of its classifier. For other models it is the model's pooling if
    that is trained with the encoder (CLIP's normalized CLS, SigLIP's attention head, RADIO's summary); the CLS token if
    the pooler is a dense layer, which few checkpoints train; otherwise the mean of all tokens, including padding.
    """

    runs_own_forward = True

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.model = model
        self._named = model  # for info(): PEFT puts its wrapper into `model`
        self._parts = parts
        self._config = attention_config(parts.layers[0]) or parts.tower.config
        width = getattr(self._config, "hidden_size", None)
        if not isinstance(width, int):
            raise BackboneError(
                f"{type(parts.tower).__name__} has no common width of its layers (hidden_size in its config), so it "
                f"is not a plain ViT. {SUPPORTED}"
            )
        self.dim: int = width
        self.feature_dim: int = self.dim
        self.num_classes = 0
        if parts.heads:
            head: Any = linear_within(getattr(model, parts.heads[0]))
            self.feature_dim, self.num_classes = head.in_features, head.out_features
        elif _pools_summary(parts.tower):
            self.feature_dim = self.dim * len(parts.tower.config.summary_idxs)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The vision tower's encoder layers, in order."""
        return tuple(self._parts.layers)

    def attach(self) -> None:
        """Let all layers take prompts and check one layer of each kind."""
        attach_blocks(self.blocks, self.dim, hint=SUPPORTED)
        try:
            self._pass_through_heads()
        except BackboneError:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the original class of every module."""
        detach_blocks([*self.blocks, *self._heads()])

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """Compute the tokens that enter the first layer from the arguments of the model's (or vision tower's) forward.

        Raises:
            BackboneError: The model changes tokens between layers, packs images into one sequence, or uses re-entrant
                checkpointing.
            InputError: Labels are given.
        """
        self._refuse_reentrant()
        if kwargs.get("labels") is not None:
            raise InputError(
                "labels= is for the loss of the model's own classifier, which the adapter does not use: leave it out "
                "and call your criterion on the adapter's logits."
            )
        kwargs = self._with_outputs(kwargs)
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def record(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append((tokens, args, kwargs))
            return tokens

        self._drive(self.blocks, record, *args, **kwargs)
        tokens: Any = calls[0][0] if calls else None
        if len(calls) != len(self.blocks) or any(call[0] is not tokens for call in calls):
            raise BackboneError(
                f"{type(self._parts.tower).__name__} changes tokens between its layers or skips layers, and prompts "
                "are not defined there. Turn that off in its config (for YOLOS: use_mid_position_embeddings=False)."
            )
        given = (*args, *(value for name, value in kwargs.items() if name.startswith("pixel_values")))
        images = ([value for value in given if isinstance(value, Tensor)] or [tokens])[0]
        if not images.is_floating_point():  # transformers would cast raw pixels
            raise InputError(not_floating(images))
        if images.shape[0] != tokens.shape[0]:  # len() would fix the batch size when exporting
            raise BackboneError(
                f"{type(self._parts.tower).__name__} packs {len(images)} images into {len(tokens)} token sequences, so "
                "there is no feature per image. Give images of the same size, not packed, or use another ViT."
            )
        return Stream(tokens, {"layers": [call[1:] for call in calls], "call": (args, kwargs)})

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run layers from `start`, one per prompt (n, d) or (B, n, d), cast to the tokens' dtype; None: no prompt."""
        tokens = stream.tokens
        stop = start + len(prompts)
        calls = stream.context["layers"][start:stop]
        for layer, (args, kwargs), prompt in zip(self.blocks[start:stop], calls, prompts, strict=True):
            tokens = layer(tokens, *args, **prompt_arguments(prompt, tokens.dtype), **kwargs)
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """Compute the feature (B, feature_dim) from tokens (B, N, d), as the model's forward does after its layers.

        The model runs again without its layers, including the patch embedding: about 1 % of a forward. Random steps
        (masking, dropout) draw again; only the number of their tokens matters.
        """
        args, kwargs = stream.context["call"]
        return self._feature(self._drive(self.blocks, lambda *_: stream.tokens, *args, **kwargs))

    def plain_feature(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feature without prompts, in a single run of the model's own forward."""
        return self._feature(self._drive((), lambda tokens, *_: tokens, *args, **self._with_outputs(kwargs)))

    def class_token(self, stream: Stream) -> Tensor | None:
        """Return the class token (B, d), or None if the model has none."""
        return stream.tokens[:, 0] if _has_cls(self._parts.tower) else None

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of all tokens but the class token, without those that a mask in the call excludes."""
        _, kwargs = stream.context["call"]
        if _has_cls(self._parts.tower):
            return stream.tokens[:, 1:].mean(1)
        masks = [v.flatten(1) for name, v in kwargs.items() if name.endswith("attention_mask") and v is not None]
        fitting = [mask for mask in masks if mask.shape[1] == stream.tokens.shape[1]]
        return masked_mean(stream.tokens, fitting[0] if fitting else None)

    def info(self) -> BackboneInfo:
        """Return what the model's config records."""
        return info(self._named, self._config, len(self.blocks), self.frozen_tensors())

    def preprocess(self) -> dict[str, Any]:
        """Return the image size of the config and the normalization of the family's image processor."""
        return preprocess(self._named, self._config)

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Return the state dict of the vision model, without the classifier."""
        state = self._parts.driven.state_dict()
        return list(plain_tensors(v for name, v in state.items() if name.partition(".")[0] not in self._parts.heads))

    def _with_outputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward that returns named outputs, which the feature is read from."""
        if "return_dict" in kwargs or not getattr(self._parts.driven.config, "return_dict", True):
            return {**kwargs, "return_dict": True}
        return kwargs

    def _feature(self, out: Any) -> Tensor:
        feature: Tensor = out.logits if self._parts.heads else self._pooled(out)
        return feature

    def _pooled(self, out: Any) -> Tensor:
        tower, tokens = self._parts.tower, out.last_hidden_state
        if _pools_summary(tower):
            return out.summary
        pooled = getattr(out, "pooler_output", None)
        if hasattr(getattr(tower, "pooler", None), "dense"):  # tanh of a dense layer, which is usually not trained
            pooled = None
        if _has_cls(tower):
            return tokens[:, 0] if pooled is None else pooled
        if pooled is not None and hasattr(tower, "head"):
            return pooled
        return tokens.mean(1)

    def _drive(self, blocks: Sequence[nn.Module], record: Recorder, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward with `record` in place of `blocks`; classifiers return their input.

        The inputs of two classifiers (CLS and distillation token) are averaged by the model.
        """
        self._pass_through_heads()  # PEFT may have wrapped a classifier since attach()
        with recording([*blocks, *self._heads()], record):
            return self._parts.driven(*args, **kwargs)

    def _pass_through_heads(self) -> None:
        for head in self._heads():
            pass_through(head)

    def _heads(self) -> list[nn.Module]:
        return [getattr(self._parts.driven, name) for name in self._parts.heads]

    def _refuse_reentrant(self) -> None:
        for layer in self.blocks:
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                function: Any = getattr(layer, "_gradient_checkpointing_func", None)
                if getattr(function, "keywords", {}).get("use_reentrant", False):
                    raise BackboneError(
                        "Re-entrant checkpointing passes no gradient to prompts. Call "
                        'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
                    )


def _has_cls(tower: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in _CLS_NAMES for name, _ in tower.named_parameters())


def _pools_summary(tower: nn.Module) -> bool:
    """Whether some of several CLS tokens form the summary (RADIO)."""
    return hasattr(tower, "summary_idxs")
