"""The adapter: a frozen ViT with a shared prompt, a pool of group prompts and a cosine classifier.

Not here: the way from images to features (`lpt_peft.passes`), losses, samplers, training loops, and how a block takes
prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lpt_peft.backbones.base import Backbone, execution_device
from lpt_peft.backbones.detect import find_backbone, resolve_num_classes
from lpt_peft.backbones.freezing import FrozenState
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.config import PHASES, Phase, Placement, PromptConfig, PromptMetadata, Query
from lpt_peft.delegates import DelegateMixin
from lpt_peft.errors import ConfigError
from lpt_peft.heads import CosineClassifier
from lpt_peft.pretrained import PretrainedMixin
from lpt_peft.prompting import detach_blocks, find_gradient_gap
from lpt_peft.prompts import PromptPool, SharedPrompt
from lpt_peft.starts import StartMixin

__all__ = ["PHASES", "LongTailPromptAdapter", "Phase"]


class LongTailPromptAdapter(StartMixin, PretrainedMixin, DelegateMixin):
    """A frozen Vision Transformer with trainable prompts and a cosine classifier for long-tailed data.

    Create an adapter with `wrap(vit, num_classes)`, or load it with `from_pretrained(folder, vit)`. It has two phases:
    "shared" trains a prompt for all images, "group" freezes it and trains a pool of prompts, from which each image
    selects some by cosine similarity. The classifier is trained in both. `lpt_peft.recipe` trains both prompts together
    by default. Reference: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.

    Shapes: B images, C classes; L blocks of width d, the first K without group prompts; n tokens per prompt; m group
    prompts, k selected per image.

    Attributes:
        vit: The wrapped model, frozen; the same object that was given to `wrap`.
        shared: `SharedPrompt`, prompts (L, n, d); (1, n, d) with `placement="shallow"`.
        pool: `PromptPool`, prompts (m, L-K, n, d) and keys (m, key_dim); None with `placement="shallow"`.
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
            self.shared = SharedPrompt(*config.tensor_shapes["shared.prompts"])
            pool: Any = PromptPool.from_config(config) if config.has_groups else None
            self.pool = pool
            self.head_drop = nn.Dropout(head_dropout)
            self.head = CosineClassifier(backbone.feature_dim, config.num_classes, config.logit_scale)
            for trained in self._learned_modules():
                trained.to(device=device, dtype=dtype)
        # Modules of the ViT keep their train/eval modes; new modules follow the mode of the ViT.
        self.training = self.vit.training
        for module in (*self._learned_modules(), self.head_drop):
            module.train(self.training)
        self._frozen = FrozenState(self.vit)
        self.frozen_weights = FrozenWeights(backbone)
        self.metadata = PromptMetadata(label_names=_label_names(self.vit, config.num_classes))
        self._init_call()
        self._init_state()
        self._init_passes()
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
        query: Query = "block_k",
        placement: Placement = "deep",
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
            query: What is compared with the keys of the groups: "block_k", the class token (or mean patch) that enters
                block `K + 1`, which takes a single pass; or "final", the feature of a first pass, as in the paper.
            placement: "deep", prompts in every block; or "shallow", `n` tokens that are appended to the tokens that
                enter block 1 and pass through all blocks, without groups (VPT-Shallow, Jia et al., ECCV 2022); a
                warning names sizes of groups that are given.
            head_dropout: Dropout probability before the classifier in training.
            logit_scale: Scale `s` of the cosine classifier.

        Raises:
            BackboneError: The model cannot take prompts, or is already wrapped.
            ConfigError: A number is out of range.
        """
        backbone = find_backbone(vit)
        num_classes = resolve_num_classes(backbone, num_classes)
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
            query="final" if placement == "shallow" else query,  # not used without groups
            placement=placement,
        )
        if unused := config.unused_sizes:
            warnings.warn(
                f'{", ".join(unused)}: no effect, because placement="shallow" has no groups.', UserWarning, stacklevel=2
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

    def train(self, mode: bool = True) -> LongTailPromptAdapter:
        """Set train or eval mode; batch norms of the ViT stay in eval mode, because their statistics are frozen."""
        self._follow_phase_index()
        if self.training and not mode:
            self._drop_stale_router()
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
