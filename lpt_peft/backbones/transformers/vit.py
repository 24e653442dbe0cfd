"""transformers' vision encoders as a Backbone, driven through the model's own forward.

No model's forward is restated: its layers record what they are given (`embed`), run with prompts (`run`), and hand
out the final tokens for the model to normalise and pool (`pool`). So every signature stays: pixel masks, spatial
shapes, position interpolation. Not here: finding tower and layers (`detect.py`), and what prompt files say of the
model (`info.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lpt_peft._tensors import plain_tensors
from lpt_peft.backbones.base import BackboneInfo, Stream
from lpt_peft.backbones.transformers.detect import WORKS, Parts, attention_config, find_parts, linear_within
from lpt_peft.backbones.transformers.info import info, preprocess
from lpt_peft.errors import BackboneError, InputError
from lpt_peft.prompting import Recorder, attach_blocks, batched, detach_blocks, pass_through, recording

_CLS_NAMES = frozenset(("cls_token", "class_embedding", "class_token", "cls_embedding", "cls_register_token"))


def open_backbone(model: nn.Module) -> TransformersViT:
    """The driver for a transformers model; of a model with a text tower, its vision tower.

    Raises:
        BackboneError: There is no plain ViT in it; the message says what works.
    """
    return TransformersViT(model, find_parts(model))


class TransformersViT:
    """`lpt_peft.backbones.base.Backbone` for vision encoders of transformers.

    The feature: for a classification model, what enters its classifier. For others the model's own pooling where it is
    learnt with the encoder (CLIP's normalised CLS, SigLIP's attention head, RADIO's summary); the CLS token where the
    pooler is a dense layer, which few checkpoints train; else the mean of all tokens, padding too.
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
                f"{type(parts.tower).__name__} has no one width for all its layers (hidden_size in its config), so it "
                f"is not a plain ViT. {WORKS}"
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
        """Swap the classes of layers and attentions, then check one layer of each kind."""
        attach_blocks(self.blocks, self.dim, hint=WORKS)
        try:
            self._pass_through_heads()
        except BackboneError:
            self.detach()
            raise

    def detach(self) -> None:
        """Give every module its original class back."""
        detach_blocks([*self.blocks, *self._heads()])

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """What the model's own forward takes (of a model with a text tower: the vision tower's) to block 1's tokens.

        Raises:
            BackboneError: The model does something to tokens between layers, packs images into one sequence, or
                checkpoints by re-entrance.
            InputError: There are labels.
        """
        self._refuse_reentrant()
        if kwargs.get("labels") is not None:
            raise InputError(
                "labels= is for the loss of the model's own head, and the adapter answers with the logits of its own: "
                "leave it out and call your criterion on them."
            )
        if "return_dict" in kwargs or not getattr(self._parts.driven.config, "return_dict", True):
            kwargs["return_dict"] = True  # how the answer is read here; the adapter's own is a tensor anyhow
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def record(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append((tokens, args, kwargs))
            return tokens

        self._drive(record, *args, **kwargs)
        tokens: Any = calls[0][0] if calls else None
        if len(calls) != len(self.blocks) or any(call[0] is not tokens for call in calls):
            raise BackboneError(
                f"{type(self._parts.tower).__name__} changes tokens between its layers or leaves layers out, and "
                "prompts have no defined place there. Switch that off in its config (for YOLOS: "
                "use_mid_position_embeddings=False)."
            )
        given = (*args, *(value for name, value in kwargs.items() if name.startswith("pixel_values")))
        images = ([value for value in given if isinstance(value, Tensor)] or [tokens])[0]
        if images.shape[0] != tokens.shape[0]:  # len() would fix the batch size when exporting
            raise BackboneError(
                f"{type(self._parts.tower).__name__} packs {len(images)} images into {len(tokens)} token sequences, so "
                "there is no feature for each image. Give it one image size, unpacked, or use another ViT."
            )
        return Stream(tokens, {"layers": [call[1:] for call in calls], "call": (args, kwargs)})

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Layers from `start` on, one for each prompt (n, d) or (B, n, d), cast to the tokens' dtype."""
        tokens = stream.tokens
        stop = start + len(prompts)
        given = stream.context["layers"][start:stop]
        for layer, (args, kwargs), prompt in zip(self.blocks[start:stop], given, prompts, strict=True):
            tokens = layer(tokens, *args, prompt=batched(prompt).to(tokens.dtype), **kwargs)
        return Stream(tokens, stream.context)

    def pool(self, stream: Stream) -> Tensor:
        """Tokens (B, N, d) to the feature (B, feature_dim), by what the model's own forward does behind the layers.

        The model runs once more around its layers, patch embedding included: about 1 % of a forward. What is random
        in there (masking, dropout) draws anew; of its result only the number of tokens matters.
        """
        args, kwargs = stream.context["call"]
        out = self._drive(lambda *_: stream.tokens, *args, **kwargs)
        feature: Tensor = out.logits if self._parts.heads else self._pooled(out)
        return feature

    def info(self) -> BackboneInfo:
        """What the model's config records."""
        return info(self._named, self._config, len(self.blocks), self.frozen_tensors())

    def preprocess(self) -> dict[str, Any]:
        """Image size of the config, normalisation of the family's image processor; no crop beyond the image."""
        return preprocess(self._named, self._config)

    def frozen_tensors(self) -> Iterable[Tensor]:
        """The state dict of the vision part, without the classifier."""
        state = self._parts.driven.state_dict()
        return list(plain_tensors(v for name, v in state.items() if name.partition(".")[0] not in self._parts.heads))

    def _pooled(self, out: Any) -> Tensor:
        tower, tokens = self._parts.tower, out.last_hidden_state
        if _pools_summary(tower):
            return out.summary
        pooled = getattr(out, "pooler_output", None)
        if hasattr(getattr(tower, "pooler", None), "dense"):  # tanh of a dense layer, untrained more often than not
            pooled = None
        if _has_cls(tower):
            return tokens[:, 0] if pooled is None else pooled
        if pooled is not None and hasattr(tower, "head"):
            return pooled
        return tokens.mean(1)

    def _drive(self, record: Recorder, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward: layers answer as `record` does, classifiers with what enters them.

        Of two classifiers (CLS and distillation token) the model's own average is what remains.
        """
        self._pass_through_heads()  # PEFT may have put a wrapper around one since attach()
        with recording([*self.blocks, *self._heads()], record):
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
                        "Re-entrant checkpointing gives prompts no gradient. Call model.gradient_checkpointing_enable("
                        'gradient_checkpointing_kwargs={"use_reentrant": False}).'
                    )


def _has_cls(tower: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in _CLS_NAMES for name, _ in tower.named_parameters())


def _pools_summary(tower: nn.Module) -> bool:
    """RADIO: several CLS tokens, of which some make the summary."""
    return hasattr(tower, "summary_idxs")
