"""Attributes of the wrapped model that tools of timm, transformers and PEFT read from an adapter.

The list is fixed. Methods that would compute without prompts, such as `forward_features`, are not on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lpt_peft.backbones import Backbone
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import StateError
from lpt_peft.heads import CosineClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DELEGATED = frozenset(
    (
        "set_grad_checkpointing",
        *("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
        *("activation_checkpointing_enable", "activation_checkpointing_disable"),
        *("is_gradient_checkpointing", "is_activation_checkpointing", "supports_gradient_checkpointing"),
        "in_chans",  # read by timm's distillation
        *("main_input_name", "input_modalities", "name_or_path", "get_input_embeddings"),
    )
)
_COMPUTED = frozenset(("config", "pretrained_cfg", "default_cfg", "device", "dtype", "fingerprint"))
_REPLACED = {
    "forward_features": "it would compute without prompts; use adapter.features(images)",
    "forward_head": "it would use the model's own classifier; use adapter(images)",
}


class AttributeMissingError(StateError, AttributeError):
    """The adapter or the wrapped model does not have this attribute; `hasattr` returns False."""


class DelegateMixin(nn.Module):
    """Attributes of the wrapped model; `hasattr` is True if that model has the attribute.

    Attributes:
        accepts_loss_kwargs: False; transformers' Trainer then does not pass `num_items_in_batch` to `forward`.
    """

    vit: nn.Module
    head: CosineClassifier
    backbone: Backbone
    prompt_config: PromptConfig
    metadata: PromptMetadata

    accepts_loss_kwargs = False
    base_model_prefix = ""  # PEFT's get_peft_model reads it from models with a config
    _keys_to_ignore_on_save = None  # Trainer reads it when a checkpoint lacks a key

    if TYPE_CHECKING:
        set_grad_checkpointing: Callable[..., None]
        gradient_checkpointing_enable: Callable[..., None]
        gradient_checkpointing_disable: Callable[[], None]
        activation_checkpointing_enable: Callable[..., None]
        activation_checkpointing_disable: Callable[[], None]
        in_chans: int
        is_gradient_checkpointing: bool
        is_activation_checkpointing: bool
        supports_gradient_checkpointing: bool
        main_input_name: str
        input_modalities: tuple[str, ...]
        name_or_path: str
        get_input_embeddings: Callable[[], nn.Module]

    @property
    def num_classes(self) -> int:
        """Number of classes `C` of the adapter's classifier."""
        return self.prompt_config.num_classes

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return self.prompt_config.feature_dim or self.prompt_config.dim

    @property
    def head_hidden_size(self) -> int:
        """Width of the features, under timm's name for the input of a head."""
        return self.num_features

    def get_classifier(self) -> CosineClassifier:
        """Return the adapter's classifier."""
        return self.head

    @property
    def device(self) -> torch.device:
        """Device of the wrapped model's first parameter, on which images should be."""
        return self._reference.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the wrapped model's first floating point parameter, which images should have."""
        return self._reference.dtype

    @property
    def _reference(self) -> nn.Parameter:
        return next(parameter for parameter in self.vit.parameters() if parameter.is_floating_point())

    @property
    def pretrained_cfg(self) -> dict[str, object]:
        """Data configuration in timm's format; `timm.data.resolve_data_config(model=adapter)` reads it."""
        own = getattr(self.vit, "pretrained_cfg", None)
        return own if isinstance(own, dict) else {**self.backbone.preprocess(), "num_classes": self.num_classes}

    @property
    def default_cfg(self) -> dict[str, object]:
        """Older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @property
    def config(self) -> PreTrainedConfig:
        """Config of a wrapped transformers model, with the classes of the adapter.

        It is the model's own object if the classes are the same; otherwise a copy with the number of classes of the
        adapter's head and the names in `metadata.label_names`.
        """
        own: Any = self.vit.config
        names = self.metadata.label_names
        labels = dict(enumerate(names or [f"LABEL_{index}" for index in range(self.num_classes)]))
        if own.id2label == labels or (names is None and len(own.id2label) == self.num_classes):
            return cast("PreTrainedConfig", own)
        known: Any = self.__dict__.get("_config_copy")
        if known is None or known[0] is not own or known[1].id2label != labels:
            changed = copy.deepcopy(own)
            changed.id2label, changed.label2id = labels, {name: index for index, name in labels.items()}
            changed.problem_type = None
            self._config_copy = known = (own, changed)
        return cast("PreTrainedConfig", known[1])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers should not decay: those of the wrapped model.

        Prompts, keys and head are decayed, which is part of the method.
        """
        names: Callable[[], set[str]] | None = getattr(self.vit, "no_weight_decay", None)
        return {f"vit.{name}" for name in names()} if names else set()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable parameters and of all parameters, including the wrapped model."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all parameters, and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Get a delegated attribute from the wrapped model, or raise with a reason."""
        if name in _DELEGATED or name in _COMPUTED:
            vit = self.__dict__.get("_modules", {}).get("vit")
            if name in _DELEGATED and hasattr(vit, name):
                return cast("Tensor | nn.Module", getattr(vit, name))
            owner = (
                "adapter was unwrapped; wrap(vit) creates another"
                if vit is None
                else f"wrapped model, a {type(vit).__name__}, has no {name}"
            )
            raise AttributeMissingError(f"{type(self).__name__}.{name} comes from the wrapped model; this {owner}.")
        if name in _REPLACED:
            raise AttributeMissingError(f"{type(self).__name__} has no {name}: {_REPLACED[name]}.")
        return super().__getattr__(name)
