"""The adapter: a frozen ViT with a shared prompt, a pool of group prompts and a cosine classifier.

`_features` is the method from start to end: embed, blocks with the shared prompt, pool, select groups, the upper blocks
again with both prompts, pool. Not here: losses, samplers, training loops, and how a block takes prompts
(`lpt_peft.prompting`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.backbones.base import Backbone, execution_device
from lpt_peft.backbones.detect import find_backbone
from lpt_peft.backbones.freezing import FrozenState
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.config import PHASES, Phase, PromptConfig, PromptMetadata
from lpt_peft.delegates import DelegateMixin
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.phase import in_process_group
from lpt_peft.pretrained import PretrainedMixin
from lpt_peft.prompting import detach_blocks, find_gradient_gap
from lpt_peft.prompts import PromptPool, SharedPrompt
from lpt_peft.starts import StartMixin

__all__ = ["PHASES", "LongTailPromptAdapter", "Phase"]


class LongTailPromptAdapter(StartMixin, PretrainedMixin, DelegateMixin):
    """A frozen Vision Transformer with trainable prompts and a cosine classifier for long-tailed data.

    Create an adapter with `wrap(vit, num_classes)`, or load it with `from_pretrained(folder, vit)`. Training has two
    phases: "shared" trains a prompt for all images, "group" freezes it and trains a pool of prompts, from which each
    image selects some by cosine similarity. The classifier is trained in both. Reference: LPT, Dong et al., ICLR 2023,
    arXiv 2210.01033.

    Shapes: B images, C classes; L blocks of width d, the first K without group prompts; n tokens per prompt; m group
    prompts, k selected per image.

    Attributes:
        vit: The wrapped model, frozen; the same object that was given to `wrap`.
        shared: `SharedPrompt`, prompts (L, n, d).
        pool: `PromptPool`, prompts (m, L-K, n, d) and keys (m, d).
        head: `CosineClassifier`, weight (C, d).
        phase: "shared" or "group"; assign it before training that phase.
        prompt_config: `PromptConfig` with all sizes.
        metadata: `PromptMetadata` for prompt files, such as class names and counts.
        criterion: Loss of a call with `labels=` in training mode.
        eval_criterion: Loss of a call with `labels=` in eval mode.
        backbone: Driver of `vit`, for its library.

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
        """Use `wrap` instead, which finds the driver of a model and builds the configuration."""
        super().__init__()
        if not isinstance(head_dropout, (int, float)) or not 0.0 <= head_dropout < 1.0:
            raise ConfigError(f"head_dropout={head_dropout!r} must be a number of at least 0 and below 1.")
        depth = len(backbone.blocks)
        if (config.dim, config.depth, config.feature_dim) != (backbone.dim, depth, backbone.feature_dim):
            raise ConfigError(
                f"The configuration is for a ViT of width {config.dim}, {config.depth} blocks and feature width "
                f"{config.feature_dim}; this {type(backbone.model).__name__} has {backbone.dim}, {depth} and "
                f"{backbone.feature_dim}. Load the prompts on the backbone they were trained on."
            )
        self.backbone = backbone
        self.prompt_config = config
        self.vit = backbone.model
        # At least float32, also on a bfloat16 backbone; blocks cast the prompts.
        device = execution_device(self.vit)
        dtype = torch.promote_types(next(self.vit.parameters()).dtype, torch.float32)
        with torch.inference_mode(False):  # parameters created in inference mode would silently get no gradient
            self.shared = SharedPrompt(config.depth, config.prompt_length, config.dim)
            self.pool = PromptPool.from_config(config)
            self.head_drop = nn.Dropout(head_dropout)
            self.head = CosineClassifier(backbone.feature_dim, config.num_classes, config.logit_scale)
            for trained in (self.shared, self.pool, self.head):
                trained.to(device=device, dtype=dtype)
        # Modules of the ViT keep their train/eval modes; new modules follow the mode of the ViT.
        self.training = self.vit.training
        for module in (self.shared, self.pool, self.head_drop, self.head):
            module.train(self.training)
        self._frozen = FrozenState(self.vit)
        self.frozen_weights = FrozenWeights(backbone)
        self.metadata = PromptMetadata(label_names=_label_names(self.vit, config.num_classes))
        self._init_call()
        self._pooling = getattr(backbone, "pooling", None)
        self._init_state()
        self._attached = tuple(backbone.blocks)
        backbone.attach()  # the model is not changed before this line
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
        """Add prompts and a cosine classifier to a ViT and freeze it.

        Outside the adapter, `vit(images)` returns the same as before; tensors and state-dict keys are not changed.

        Args:
            vit: A plain ViT of timm, transformers, torchvision or open_clip; its blocks are changed in place.
            num_classes: Number of classes `C`; None takes that of the model's classifier.
            prompt_length: Prompt tokens `n` in each block.
            pool_size: Number of group prompts `m`.
            top_k: Group prompts `k` selected per image.
            shared_layers: Number of first blocks `K` that take the shared prompt only; None means half of the blocks.
            head_dropout: Dropout probability before the classifier in training.
            logit_scale: Scale `s` of the cosine classifier.

        Raises:
            BackboneError: The model cannot take prompts, or is already wrapped.
            ConfigError: A number is out of range.
        """
        backbone = find_backbone(vit)
        if num_classes is None:
            num_classes = backbone.num_classes
            if num_classes < 1:
                raise ConfigError(f"This {type(vit).__name__} has no classifier: give wrap(vit, num_classes=...).")
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

    def unwrap(self) -> nn.Module:
        """Remove the prompts and return the wrapped model; the adapter cannot be used afterwards.

        Classes, forwards and `requires_grad` are as they were before `wrap`; the train/eval mode does not change.
        If layers such as LoRA's were added in the meantime, `requires_grad` is left unchanged.
        """
        self._check_wrapped()
        vit = self.vit
        self.backbone.detach()
        detach_blocks(self._attached)  # also those that were removed since
        self._frozen.restore(vit)
        del self.vit
        return vit

    def features(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input of the classifier, (B, d), in the current phase, before dropout.

        Arguments are those of the wrapped model's forward.

        Raises:
            InputError: The images do not fit the wrapped model.
            StateError: As `forward`; also inside `disable_adapter()`.
        """
        self._check_wrapped()
        if self._is_disabled():
            raise StateError("features() needs the prompts: call it outside disable_adapter().")
        return self._features(images, *args, **kwargs)[0]

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training or not in_process_group():
            self._follow_phase_index()
        self._check_unchanged()
        args = () if images is None else (images, *args)
        args, kwargs = self.frozen_weights.cast_inputs((args, kwargs))
        features: tuple[Tensor, Tensor, Tensor, Tensor] = self._run(self._two_passes, args, kwargs)
        return features

    def _two_passes(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        backbone, shared, split = self.backbone, self.shared(), self.prompt_config.first_group_layer
        kept = backbone.run(backbone.embed(*args, **kwargs), 0, shared[:split].unbind())
        if self._phase == "shared":
            features = backbone.pool(backbone.run(kept, split, shared[split:].unbind()))
            empty = features.new_empty(features.shape[0], 0)
            return features, features, empty, empty.long()
        with torch.no_grad():
            query = backbone.pool(backbone.run(kept, split, shared[split:].unbind()))
        match = self.pool(query)
        expanded = shared[split:].to(match.prompts.dtype).unsqueeze(1).expand(-1, query.shape[0], -1, -1)
        both = [torch.cat(pair, dim=1) for pair in zip(expanded.unbind(), match.prompts.unbind(1), strict=True)]
        features = backbone.pool(backbone.run(kept, split, both))
        if self.training:
            # Adds 0: the keys then get a gradient (0) from any loss, which DDP waits for.
            features = features + 0 * match.similarity.sum(-1, keepdim=True).to(features.dtype)
        return features, query, match.similarity, match.groups

    def _check_unchanged(self) -> None:
        """Raise if the wrapped model was changed in a way that prompts and classifier do not fit any more."""
        pooling = getattr(self.backbone, "pooling", None)
        if pooling != self._pooling:
            raise StateError(
                f"The wrapped model pooled by {self._pooling!r} when it was wrapped, and by {pooling!r} now, which "
                "changes the features that prompts and head were made for. Set it back, or wrap the model again."
            )
        vit, model = self.vit, self.backbone.model
        if vit is not model and not any(module is model for module in vit.modules()):
            raise StateError(
                f"adapter.vit was replaced by another {type(vit).__name__}, which has no prompts. Wrap that model: "
                "LongTailPromptAdapter.wrap(vit), and load the prompts."
            )
        if len(self.backbone.blocks) != self.prompt_config.depth:
            raise StateError(
                f"The wrapped model has {len(self.backbone.blocks)} blocks, and {self.prompt_config.depth} when it was "
                "wrapped. Put the blocks back, or unwrap(), change the blocks and wrap the model again."
            )

    def train(self, mode: bool = True) -> LongTailPromptAdapter:
        """Set train or eval mode; batch norms of the ViT stay in eval mode, because their statistics are frozen."""
        self._follow_phase_index()
        super().train(mode)
        if (vit := self._modules.get("vit")) is not None:
            self._frozen.sync_mode(vit)
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters that the current phase trains; each phase needs a new optimizer for them."""
        self._follow_phase_index()
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def preprocess(self) -> dict[str, Any]:
        """Return how images become tensors, for `lpt_peft.data.transforms`.

        This is the data configuration of the ViT, overridden by `metadata.preprocess`: what the prompt file records of
        its training, such as EXIF orientation, background and crop.
        """
        self._check_wrapped()
        return {**self.backbone.preprocess(), **self.metadata.preprocess}

    @property
    def fingerprint(self) -> str:
        """Hash of the backbone's weights (`sha256-tensors-v1`), cached; the classifier of the ViT is left out."""
        if "vit" not in self._modules:
            raise AttributeError  # __getattr__ gives the reason
        return self.frozen_weights.fingerprint()

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Cast the frozen weights of the ViT to float32, bfloat16 or float16, and its inputs from now on.

        Prompts, keys and classifier keep their dtype, and the fingerprint remains that of the original weights. The
        lost precision does not come back: `unwrap` returns the cast model.
        """
        self._check_wrapped()
        self.frozen_weights.cast(dtype)


def _label_names(vit: nn.Module, num_classes: int) -> tuple[str, ...] | None:
    """The class names in the model's config, if there are `num_classes` of them and they are not the default names."""
    names: Any = getattr(getattr(vit, "config", None), "id2label", None)
    if not isinstance(names, dict) or sorted(names) != list(range(num_classes)):
        return None
    found = tuple(str(names[index]) for index in range(num_classes))
    return None if found == tuple(f"LABEL_{index}" for index in range(num_classes)) else found
