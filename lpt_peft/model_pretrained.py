"""Saving and loading of model files: `ModelFileMixin`.

Not here: the format (`lpt_peft.checkpoint.model_file`), prompt files (`lpt_peft.pretrained`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lpt_peft._run_folder import ModelMethod
from lpt_peft.backbones import Backbone, find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.freezing import feature_tensors
from lpt_peft.backbones.loading import build
from lpt_peft.backbones.weights import FrozenWeights, cast_dtype
from lpt_peft.checkpoint.match import check_match
from lpt_peft.checkpoint.model_file import ModelContent, check_model_writable, read_model_file, write_model_file
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import ModelFileError
from lpt_peft.heads import CosineClassifier

_Model = TypeVar("_Model", bound="ModelFileMixin")
Counts = Iterable[int] | Mapping[Any, int]
Labels = Iterable[str] | Mapping[Any, Any]


class ModelFileMixin(nn.Module):
    """The part of a `ViTClassifier` that reads and writes model files."""

    backbone: Backbone
    method: ModelMethod
    head: CosineClassifier
    metadata: PromptMetadata
    frozen_weights: FrozenWeights
    preprocess: Callable[[], dict[str, Any]]

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        is_main_process: bool = True,
        class_counts: Counts | None = None,
        label_names: Labels | None = None,
        training: Mapping[str, Any] | None = None,
        preprocess: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a model file: weights as safetensors, and `config.json`.

        A linear probe writes `head.weight` into `model.safetensors`, and the fingerprint of its ViT. Full fine-tuning
        writes the ViT's tensors into `model.safetensors`, under their names in its state dict, so that the ViT's own
        library can load it, and `head.weight` into `head.safetensors`.

        Args:
            folder: Created if missing, `~` is expanded; nothing in it but these files is touched.
            is_main_process: False checks the arguments and writes nothing.
            class_counts: Training images of each class, for shot metrics; this and the rest default to `metadata`.
            label_names: Name of each class.
            training: Free JSON up to 64 KiB: recipe, metrics with their shot rule, seeds.
            preprocess: How images become tensors, where it differs from the ViT's own data configuration.

        Raises:
            InputError: An argument does not fit the head or is not plain JSON; nothing was written.
            StateError: A tensor is not finite; nothing was written.
            PromptFileExistsError: The folder holds another library's `config.json`; nothing was written.
            ConfigError: The folder is a file, or cannot be created.
            OSError: The disk is full, or the folder is not writable.

        Example:
            >>> import tempfile, timm
            >>> from lpt_peft.vit_classifier import ViTClassifier
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
            >>> model = ViTClassifier.wrap(vit, num_classes=2, method="full")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder, label_names=["cat", "dog"])
            ...     other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
            ...     ViTClassifier.from_pretrained(folder, other).metadata.label_names
            ('cat', 'dog')
        """
        metadata = self.metadata.updated(
            class_counts=class_counts,
            label_names=label_names,
            training=training,
            preprocess={**self.preprocess(), **(preprocess or {})},
        )
        fingerprint = self.frozen_weights.compute_fingerprint() if is_main_process else "0" * 64
        content = _content_of(self.backbone, self.method, self.head, metadata, fingerprint)
        if is_main_process:
            write_model_file(folder, content)
        else:
            check_model_writable(content)

    @classmethod
    def from_pretrained(
        cls: type[_Model], folder: str | PathLike[str], vit: nn.Module | None = None, *, head_dropout: float = 0.1
    ) -> _Model:
        """Load a model file, in eval mode; after an error the ViT is as before.

        Args:
            folder: Folder that `save_pretrained` wrote.
            vit: The ViT of the training: for a linear probe with the same weights; after full fine-tuning with any
                weights, which are replaced. None builds the pretrained model that the file names.
            head_dropout: Dropout before the head while training; not stored in the file.

        Raises:
            ModelFileError: The file is refused, or its tensors are not those of this ViT.
            BackboneMismatchError: The head was trained on another backbone, or on other weights.
            BackboneError: The model is not a supported ViT.
            ConfigError: `vit` is None and the model cannot be built.
        """
        content = read_model_file(folder)
        backbone = find_backbone(build(asdict(content.backbone)) if vit is None else vit)
        _check_backbone(content, backbone, Path(folder))
        construct: Any = cls
        with torch.random.fork_rng(devices=[]):  # the constructor draws initial class vectors
            model: _Model = construct(
                backbone,
                len(content.head),
                method=content.method,
                head_dropout=head_dropout,
                logit_scale=content.logit_scale,
            )
        _load_weights(backbone, content)
        model.head.weight.data = content.head.to(model.head.weight.device)
        model.metadata = content.metadata
        return model.eval()


def _content_of(
    backbone: Backbone, method: ModelMethod, head: CosineClassifier, metadata: PromptMetadata, fingerprint: str
) -> ModelContent:
    """Collect the content of a model file.

    Args:
        backbone: Driver of the ViT.
        method: With "full", the ViT's weights belong to the content.
        head: The classifier.
        metadata: Its `preprocess` is complete.
        fingerprint: Of the ViT's weights.
    """
    return ModelContent(
        method=method,
        head=head.weight.detach(),
        vit=feature_tensors(backbone) if method == "full" else {},
        logit_scale=head.scale,
        metadata=replace(metadata, backbone_dtype=cast_dtype(backbone.model) or metadata.backbone_dtype or "float32"),
        backbone=backbone.info(),
        preprocess=metadata.preprocess,
        fingerprint=fingerprint,
    )


def _check_backbone(content: ModelContent, backbone: Backbone, folder: Path) -> None:
    """Check that a ViT is the one that a content was trained on; after full fine-tuning, that it can take the weights.

    Args:
        content: Of a model file.
        backbone: Driver of the ViT.
        folder: Of the file, for messages.

    Raises:
        BackboneMismatchError: A head was trained on another backbone, or on other weights.
        ModelFileError: The tensors are not those of this ViT.
    """
    if content.method == "linear_probe":
        check_match(content, backbone, "error")
    width, name = content.head.shape[1], type(backbone.model).__name__
    hint = f"Give the ViT of the training, {content.backbone.architecture} of {content.backbone.library}."
    if width != backbone.feature_dim:
        raise ModelFileError(
            f"The head in {folder} is for features of width {width}, those of this {name} have {backbone.feature_dim}. "
            f"{hint}"
        )
    if content.method == "linear_probe":
        return
    given, own = content.vit, feature_tensors(backbone)
    if given.keys() != own.keys():
        missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise ModelFileError(
            f"The weights in {folder} are not those of this {name}: missing {missing[:4]}, unknown {extra[:4]}. {hint}"
        )
    for key, tensor in given.items():
        if tensor.shape != own[key].shape or tensor.dtype != own[key].dtype:
            raise ModelFileError(
                f"{key} in {folder} is {tensor.dtype} of shape {tuple(tensor.shape)}, and {own[key].dtype} of shape "
                f"{tuple(own[key].shape)} in this {name}. {hint}"
            )
    if (heads := backbone.info().num_heads) != content.backbone.num_heads:
        raise ModelFileError(
            f"The weights in {folder} are for {content.backbone.num_heads} attention heads, and this {name} has "
            f"{heads}. {hint}"
        )
    if fingerprint(given.values()) != content.fingerprint:
        raise ModelFileError(f"The weights in {folder} do not have the fingerprint that config.json states. {hint}")


@torch.no_grad()
def _load_weights(backbone: Backbone, content: ModelContent) -> None:
    """Copy the ViT's tensors of a content, which `_check_backbone` accepted, into the ViT."""
    own = feature_tensors(backbone)
    for name, tensor in content.vit.items():
        own[name].copy_(tensor)
