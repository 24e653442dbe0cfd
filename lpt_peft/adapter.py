"""LongTailPromptAdapter: a frozen ViT with a shared prompt, a pool of group prompts and a cosine head.

One straight line in `forward`: embed, blocks with shared prompts, pool, query, choose groups, the upper
blocks again with both prompts, pool, classify. Not here: losses, samplers, training loops, and how a
block takes prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.backbones import Backbone, find_backbone
from lpt_peft.backbones.base import execution_device
from lpt_peft.backbones.freezing import FrozenState
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.call import CallMixin
from lpt_peft.config import PHASES, Phase, PromptConfig, PromptMetadata
from lpt_peft.delegates import DelegateMixin
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.phase import in_process_group
from lpt_peft.pretrained import PretrainedMixin
from lpt_peft.prompting import find_gradient_gap
from lpt_peft.prompts import PromptPool, SharedPrompt

__all__ = ["PHASES", "LongTailPromptAdapter", "Phase"]


class LongTailPromptAdapter(PretrainedMixin, DelegateMixin, CallMixin):
    """Long-tailed Prompt Tuning on a ViT that stays as it is. Build one with `wrap`.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.

    Attributes:
        vit: The wrapped model, the caller's very object, frozen.
        shared: `SharedPrompt`, prompts (L, n, d).
        pool: `PromptPool`, prompts (m, L-K, n, d) and keys (m, d).
        head: `CosineClassifier`, weight (C, d).
        prompt_config: `PromptConfig`.
        metadata: `PromptMetadata` for prompt files: of the file it was loaded from, else the class names that the
            wrapped model has for as many classes.
        criterion: Loss of a call with `labels=` in training mode; see `lpt_peft.call.CallMixin`, as for `forward`.
        eval_criterion: The same in eval mode.
        backbone: How the adapter drives `vit`.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=5)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> adapter(images).shape
        torch.Size([2, 5])
        >>> adapter.phase = "group"
        >>> adapter(images, return_output=True).groups.shape
        torch.Size([2, 2])
        >>> adapter.unwrap() is vit
        True
    """

    def __init__(self, backbone: Backbone, config: PromptConfig, *, head_dropout: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= head_dropout < 1.0:
            raise ConfigError(f"head_dropout={head_dropout} must be at least 0 and below 1.")
        depth = len(backbone.blocks)
        if (config.dim, config.depth, config.feature_dim) != (backbone.dim, depth, backbone.feature_dim):
            raise ConfigError(
                f"The configuration is for a ViT of width {config.dim}, {config.depth} blocks and feature width "
                f"{config.feature_dim}; this {type(backbone.model).__name__} has {backbone.dim}, {depth} and "
                f"{backbone.feature_dim}. Load the prompts on the backbone they were learnt on."
            )
        self.backbone = backbone
        self.prompt_config = config
        self.vit = backbone.model
        self.shared = SharedPrompt(config.depth, config.prompt_length, config.dim)
        self.pool = PromptPool.from_config(config)
        self.head_drop = nn.Dropout(head_dropout)
        self.head = CosineClassifier(backbone.feature_dim, config.num_classes, config.logit_scale)
        # Learnt in float32 or wider, also on a bfloat16 backbone; attention casts the prompts.
        device = execution_device(self.vit)
        dtype = torch.promote_types(next(self.vit.parameters()).dtype, torch.float32)
        for learnt in (self.shared, self.pool, self.head):
            learnt.to(device=device, dtype=dtype)
        # The ViT's own modes stay as they are, module by module; what is new follows its top.
        self.training = self.vit.training
        for module in (self.shared, self.pool, self.head_drop, self.head):
            module.train(self.training)
        self._frozen = FrozenState(self.vit)
        self.frozen_weights = FrozenWeights(backbone)
        self.metadata = PromptMetadata(label_names=_label_names(self.vit, config.num_classes))
        self._init_call()
        self._pooling = getattr(backbone, "pooling", None)
        self._init_state()
        backbone.attach()  # last of what can fail: until here the model is untouched
        try:
            self._gradient_gap = find_gradient_gap(backbone.blocks, backbone.dim)
        except BaseException:
            backbone.detach()
            raise
        self._frozen.freeze(self.vit)
        self._init_phase(device)

    @classmethod
    def wrap(
        cls,
        vit: nn.Module,
        num_classes: int | None = None,
        *,
        prompt_length: int = 10,
        pool_size: int = 20,
        top_k: int = 2,
        shared_layers: int | None = None,
        head_dropout: float = 0.1,
        logit_scale: float = 20.0,
    ) -> LongTailPromptAdapter:
        """Give a ViT prompts. The model is frozen and answers as before outside the adapter.

        Args:
            vit: A plain ViT; its blocks are swapped in place, its tensors and state-dict keys untouched.
            num_classes: Classes `C` of the new head; None takes the number of the model's own.
            prompt_length: Tokens `n` of a prompt in each block.
            pool_size: Groups `m`.
            top_k: Groups `k` chosen per image.
            shared_layers: Blocks `K` with the shared prompt only; None means half of the blocks.
            head_dropout: Dropout before the head, while training.
            logit_scale: `s` of the cosine head.

        Raises:
            BackboneError: The model cannot take prompts, or is wrapped already.
            ConfigError: A number is out of range.
        """
        backbone = find_backbone(vit)
        if num_classes is None:
            num_classes = backbone.num_classes
            if num_classes < 1:
                raise ConfigError(f"This {type(vit).__name__} has no head of its own: give wrap(vit, num_classes=...).")
        config = PromptConfig(
            dim=backbone.dim,
            depth=len(backbone.blocks),
            num_classes=num_classes,
            feature_dim=backbone.feature_dim,
            prompt_length=prompt_length,
            shared_layers=shared_layers,
            pool_size=pool_size,
            top_k=top_k,
            logit_scale=logit_scale,
        )
        return cls(backbone, config, head_dropout=head_dropout)

    def train(self, mode: bool = True) -> LongTailPromptAdapter:
        """Set the mode; batch norms of the ViT stay in eval mode, for their running statistics are frozen, too."""
        self._follow_phase_index()
        super().train(mode)
        if (vit := self._modules.get("vit")) is not None:
            self._frozen.sync_mode(vit)
        return self

    def features(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """What the head sees, (B, d), in the present phase; arguments as the wrapped model takes them.

        Raises:
            StateError: As `forward`; also inside `disable_adapter()`, for the plain model has its own way to features.
        """
        self._check_wrapped()
        if self._is_disabled():
            raise StateError("features() is the adapter's: call it outside disable_adapter().")
        return self._features(images, *args, **kwargs)[0]

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training or not in_process_group():
            self._follow_phase_index()
        pooling = getattr(self.backbone, "pooling", None)
        if pooling != self._pooling:
            raise StateError(
                f"The wrapped model pooled by {self._pooling!r} when it was wrapped, and by {pooling!r} now, which "
                "changes the features that prompts and head were made for. Set it back, or wrap the model anew."
            )
        args = () if images is None else (images, *args)
        args, kwargs = self.frozen_weights.cast_inputs((args, kwargs))
        shared, split = self.shared(), self.prompt_config.first_group_layer
        kept = self.backbone.run(self.backbone.embed(*args, **kwargs), 0, shared[:split].unbind())
        if self._phase == "shared":
            features = self.backbone.pool(self.backbone.run(kept, split, shared[split:].unbind()))
            nothing = features.new_empty(features.shape[0], 0)
            return features, features, nothing, nothing.long()
        with torch.no_grad():
            query = self.backbone.pool(self.backbone.run(kept, split, shared[split:].unbind()))
        match = self.pool(query)
        own = shared[split:].to(match.prompts.dtype).unsqueeze(1).expand(-1, query.shape[0], -1, -1)
        both = [torch.cat(pair, dim=1) for pair in zip(own.unbind(), match.prompts.unbind(1), strict=True)]
        features = self.backbone.pool(self.backbone.run(kept, split, both))
        if self.training:
            # Adds 0: a loss on the logits alone then gives the keys a gradient, of 0, which DDP waits for.
            features = features + 0 * match.similarity.sum(-1, keepdim=True).to(features.dtype)
        return features, query, match.similarity, match.groups

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the present phase learns: give these to the optimizer, anew for each phase."""
        self._follow_phase_index()
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def fingerprint(self) -> str:
        """`sha256-tensors-v1` of the backbone without its head; computed once, and again when a tensor has changed."""
        self._check_wrapped()
        return self.frozen_weights.fingerprint()

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Cast the frozen weights of the ViT to float32, bfloat16 or float16, and from now on its inputs.

        Prompts, keys and head keep their dtype, and the fingerprint stays that of the original weights. What the cast
        loses is lost: `unwrap` gives the cast model back.
        """
        self._check_wrapped()
        self.frozen_weights.cast(dtype)

    def unwrap(self) -> nn.Module:
        """Take the prompts out and give back the very model that was wrapped; the adapter is of no use after that.

        Classes, forwards and `requires_grad` are as they were before `wrap`; the train/eval mode is the present one.
        Where layers were put in since, such as LoRA's, `requires_grad` is left as it is.
        """
        self._check_wrapped()
        vit = self.vit
        self.backbone.detach()
        self._frozen.restore(vit)
        del self.vit
        return vit


def _label_names(vit: nn.Module, num_classes: int) -> tuple[str, ...] | None:
    """The class names in the model's config, if they are for as many classes and not the generic ones."""
    names: Any = getattr(getattr(vit, "config", None), "id2label", None)
    if not isinstance(names, dict) or sorted(names) != list(range(num_classes)):
        return None
    found = tuple(str(names[index]) for index in range(num_classes))
    return None if found == tuple(f"LABEL_{index}" for index in range(num_classes)) else found
