"""LongTailPromptAdapter: a frozen ViT with a shared prompt, a pool of group prompts and a cosine head.

One straight line in `forward`: embed, blocks with shared prompts, pool, query, choose groups, the upper
blocks again with both prompts, pool, classify. Not here: losses, samplers, training loops, and how a
block takes prompts (`lpt_peft.attention`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpt_peft.backbones import Backbone, find_backbone
from lpt_peft.backbones.fingerprint import whole
from lpt_peft.backbones.frozen import Standstill
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.output import AdapterOutput
from lpt_peft.prompts import PromptPool, SharedPrompt

Phase = Literal["shared", "group"]
Source = str | PathLike[str]
PHASES: tuple[Phase, ...] = ("shared", "group")

_NOTHING_LEARNT = (
    "Prompts and head are all frozen while training; peft.get_peft_model(adapter) does that. Assign adapter.phase once "
    "more to open what the phase learns, or give PEFT the ViT alone: wrap(get_peft_model(vit, ...))."
)


class LongTailPromptAdapter(nn.Module):
    """Long-tailed Prompt Tuning on a ViT that stays as it is. Build one with `wrap`.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.

    Attributes:
        vit: The wrapped model, the caller's very object, frozen.
        shared: `SharedPrompt`, prompts (L, n, d).
        pool: `PromptPool`, prompts (m, L-K, n, d) and keys (m, d).
        head: `CosineClassifier`, weight (C, d).
        config: `PromptConfig`.
        metadata: `PromptMetadata` for prompt files; empty unless loaded from one.
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

    vit: nn.Module

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
        self.config = config
        self.vit = backbone.model
        self.shared = SharedPrompt(config.depth, config.prompt_length, config.dim)
        self.pool = PromptPool.from_config(config)
        self.head_drop = nn.Dropout(head_dropout)
        self.head = CosineClassifier(backbone.feature_dim, config.num_classes, config.logit_scale)
        # Learnt in float32 or wider, also on a bfloat16 backbone; attention casts the prompts.
        reference = next(self.vit.parameters())
        dtype = torch.promote_types(reference.dtype, torch.float32)
        for learnt in (self.shared, self.pool, self.head):
            learnt.to(device=reference.device, dtype=dtype)
        # The ViT's own modes stay as they are, module by module; what is new follows its top.
        self.training = self.vit.training
        for module in (self.shared, self.pool, self.head_drop, self.head):
            module.train(self.training)
        self._standstill = Standstill(self.vit)
        self.frozen_weights = FrozenWeights(backbone)
        self.metadata = PromptMetadata()
        backbone.attach()  # last of what can fail: until here the model is untouched
        self._standstill.begin(self.vit)
        self.phase = "shared"

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

    @property
    def phase(self) -> Phase:
        """What is learnt besides the head: "shared" prompts, or "group" prompts and keys on frozen shared ones."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase not in PHASES:
            raise ConfigError(f'phase={phase!r} must be "shared" or "group".')
        self._phase: Phase = phase
        self.shared.requires_grad_(phase == "shared")
        self.pool.requires_grad_(phase == "group")
        self.head.requires_grad_(True)

    def train(self, mode: bool = True) -> LongTailPromptAdapter:
        """Set the mode; batch norms of the ViT stay in eval mode, for their running statistics are frozen, too."""
        super().train(mode)
        if (vit := self._modules.get("vit")) is not None:
            self._standstill.follow(vit)
        return self

    def forward(
        self, images: Any = None, *args: Any, return_output: bool = False, **kwargs: Any
    ) -> Tensor | AdapterOutput:
        """Classify images.

        Args:
            images: What the wrapped model's own forward takes first: (B, 3, H, W) for most, a dict of padded
                patches for NaFlex; left out where the model takes keywords, as `pixel_values=`.
            *args: The rest of what the wrapped model takes.
            return_output: Return an `AdapterOutput` instead of the logits alone.
            **kwargs: The rest of what the wrapped model takes.

        Returns:
            Logits (B, C) float32 or float64, or `AdapterOutput`.
        """
        learnt = (self.get_parameter(name) for name in self.config.tensor_shapes)
        if self.training and torch.is_grad_enabled() and not any(one.requires_grad for one in learnt):
            warnings.warn(_NOTHING_LEARNT, UserWarning, stacklevel=2)
        features, query, similarity, groups = self._features(images, *args, **kwargs)
        logits = self.head(self.head_drop(features))
        return AdapterOutput(logits, features, query, similarity, groups) if return_output else logits

    def features(self, images: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """What the head sees, (B, d), in the present phase; arguments as in `forward`."""
        return self._features(images, *args, **kwargs)[0]

    def _features(self, images: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._check_wrapped()
        args = () if images is None else (images, *args)
        args, kwargs = self.frozen_weights.cast_inputs((args, kwargs))
        shared, split = self.shared(), self.config.first_group_layer
        kept = self.backbone.run(self.backbone.embed(*args, **kwargs), 0, shared[:split].unbind())
        if self._phase == "shared":
            features = self.backbone.pool(self.backbone.run(kept, split, shared[split:].unbind()))
            nothing = features.new_empty(features.shape[0], 0)
            return features, features, nothing, nothing.long()
        with torch.no_grad():
            query = self.backbone.pool(self.backbone.run(kept, split, shared[split:].unbind()))
        match = self.pool(query)
        both = torch.cat([shared[split:].expand(query.shape[0], -1, -1, -1), match.prompts], dim=2)
        features = self.backbone.pool(self.backbone.run(kept, split, both.unbind(1)))
        return features, query, match.similarity, match.groups

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Copies of what was learnt, and nothing of the backbone; under FSDP2, gathered: all processes must call it.

        Returns:
            `shared.prompts` (L, n, d), `pool.prompts` (m, L-K, n, d), `pool.keys` (m, d), `head.weight` (C, d).
        """
        # FSDP2 frees the buffers that parameters lie in between passes: an alias would not outlive them.
        return {name: whole(self.get_parameter(name).detach()).clone() for name in self.config.tensor_shapes}

    def load_adapter_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors as given by `adapter_state_dict` into the adapter; all or nothing.

        Raises:
            InputError: A name, a shape or a value (NaN, infinity) is wrong; nothing was loaded.
        """
        self.config.check_tensors(tensors)
        with torch.no_grad():
            for name in self.config.tensor_shapes:
                self.get_parameter(name).copy_(tensors[name])

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the present phase learns: give these to the optimizer, anew for each phase."""
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
        self._standstill.end(vit)
        del self.vit
        return vit

    def _check_wrapped(self) -> None:
        if "vit" not in self._modules:
            raise StateError("This adapter was unwrapped; call LongTailPromptAdapter.wrap(vit) for a new one.")

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write a prompt file: see `lpt_peft.checkpoint.save_prompts` for the options."""
        from lpt_peft.checkpoint import save_prompts  # noqa: PLC0415 - a storey above, by contract a method here

        save_prompts(self, folder, **options)

    @classmethod
    def from_pretrained(cls, source: Source, vit: nn.Module | None = None, **options: Any) -> LongTailPromptAdapter:
        """Read a prompt file, of a folder or the Hub, onto a ViT: see `lpt_peft.hub.from_pretrained`."""
        adapter: LongTailPromptAdapter = import_module("lpt_peft.hub").from_pretrained(source, vit, kind=cls, **options)
        return adapter

    def load_prompts(self, source: Source, **options: Any) -> None:
        """Take the prompts of another prompt file instead of one's own: see `lpt_peft.hub.swap_from`."""
        import_module("lpt_peft.hub").swap_from(self, source, **options)  # a storey above, by contract a method here

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Push the prompts, and nothing of the backbone, to the Hub: see `lpt_peft.hub.push_to_hub`."""
        return import_module("lpt_peft.hub").push_to_hub(self, repo_id, **options)
