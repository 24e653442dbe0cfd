"""Conversion of checkpoints of the paper's program to prompt files.

Such a checkpoint is a `torch.save`d dictionary with a `state_dict`: the backbone under timm's names, and four tensors
of prompts. Only its names and shapes are used here, and no code of that program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft._text import printable
from lpt_peft.backbones import BackboneInfo, find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.backbones.timm.from_state_dict import architecture_of, vit_from_weights
from lpt_peft.checkpoint.content import PromptContent
from lpt_peft.checkpoint.prompt_file import write_prompt_file
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import PromptFileFormatError, PromptFileNotFoundError, PromptFileTensorError

EPS = 1e-5
"""eps of that program's LayerNorms; timm's is 1e-6."""

# Name in the checkpoint -> our name and the number of dimensions.
_TENSORS = {
    "prompt_learner.Prompt_Tokens": ("shared.prompts", 3),
    "prompt_learner.Prompt_Tokens_pool": ("pool.prompts", 4),
    "prompt_learner.Prompt_Keys": ("pool.keys", 2),
    "prompt_learner.head.weight": ("head.weight", 2),
}


@dataclass(frozen=True, eq=False)
class OfficialCheckpoint:
    """Content of a checkpoint of the paper's program.

    Attributes:
        content: Its prompts, in phase "group".
        vit: The backbone inside, in eval mode.
        architecture: timm's name of that backbone, or its class.
    """

    content: PromptContent
    vit: nn.Module
    architecture: str


def read_official(
    path: str | PathLike[str], *, num_heads: int | None = None, top_k: int = 2, logit_scale: float = 20.0
) -> OfficialCheckpoint:
    """Read a checkpoint of the paper's program, with torch's loader that runs no code.

    Args:
        path: The .pth file.
        num_heads: Heads of the backbone; None means its width divided by 64.
        top_k: Groups chosen per image, which the checkpoint does not state.
        logit_scale: Scale of the cosines, which it does not state either.

    Raises:
        PromptFileNotFoundError: The file does not exist.
        PromptFileFormatError: It is not such a checkpoint, or loading it would run code.
        PromptFileTensorError: Its prompts do not fit each other, or hold NaN.
        BackboneError: Its other tensors are not those of a plain ViT.
        ConfigError: An argument is out of range.
    """
    state = _state_dict(Path(path))
    missing = [name for name in _TENSORS if name not in state]
    unknown = [name for name in state if name.startswith("prompt_learner.") and name not in _TENSORS]
    if missing or unknown:
        raise PromptFileFormatError(
            f"{path} is not a checkpoint of the paper's program: it lacks {missing} and has unknown {unknown[:8]}."
        )
    tensors = {name: state.pop(official).float() for official, (name, _) in _TENSORS.items()}
    for official, (name, dimensions) in _TENSORS.items():
        if tensors[name].ndim != dimensions:
            raise PromptFileTensorError(
                f"{official} of {path} must have {dimensions} dimensions, not shape {tuple(tensors[name].shape)}."
            )
    tensors["head.weight"] = tensors["head.weight"].T.contiguous()  # (d, C) in the checkpoint
    vit = vit_from_weights(state, norm_eps=EPS, num_heads=num_heads)
    config = _config(tensors, top_k, logit_scale)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != config.tensor_shapes:
        raise PromptFileTensorError(f"The prompts of {path} do not fit each other: {shapes}.")
    architecture, backbone = architecture_of(vit), find_backbone(vit)
    if (config.dim, config.depth, config.feature_dim) != (backbone.dim, len(backbone.blocks), backbone.feature_dim):
        raise PromptFileTensorError(
            f"The prompts of {path} do not fit its backbone: they are for width {config.dim}, {config.depth} blocks "
            f"and feature width {config.feature_dim}, it has {backbone.dim}, {len(backbone.blocks)} and "
            f"{backbone.feature_dim}."
        )
    content = PromptContent(
        config=config,
        phase="group",
        tensors=tensors,
        metadata=PromptMetadata(),
        backbone=replace(backbone.info(), architecture=architecture, model_args={NORM_EPS: EPS}),
        preprocess=backbone.preprocess(),
        fingerprint=fingerprint(backbone.frozen_tensors()),
    )
    return OfficialCheckpoint(content, vit, architecture)


def write_official(
    checkpoint: OfficialCheckpoint, folder: str | PathLike[str], *, source: str, pretrained: nn.Module | None = None
) -> bool | None:
    """Write the prompt file of a checkpoint.

    Args:
        checkpoint: From `read_official`.
        folder: Created if missing.
        source: Origin of the prompts, for the training record.
        pretrained: Pretrained timm model of the same architecture, to compare the backbone with.

    Returns:
        Whether the backbone has the weights of `pretrained`, None without `pretrained`. Only if True does the file name
        the pretrained weights, so that it loads without a ViT.
    """
    same, info = None, checkpoint.content.backbone
    if pretrained is not None:
        backbone = find_backbone(pretrained)
        same = fingerprint(backbone.frozen_tensors()) == checkpoint.content.fingerprint
        if same:
            info = _named(info, backbone.info())
    metadata = replace(checkpoint.content.metadata, training={"converted_from": source})
    write_prompt_file(folder, replace(checkpoint.content, backbone=info, metadata=metadata))
    return same


def _named(info: BackboneInfo, pretrained: BackboneInfo) -> BackboneInfo:
    names = ("pretrained_tag", "hub_id", "hub_revision")
    return replace(info, **{name: getattr(pretrained, name) for name in names})


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PromptFileNotFoundError(f"{path} does not exist or is not a file. Give the .pth file of the program.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, pickle and torch, on bytes of any kind
        raise PromptFileFormatError(
            f"{path} is not a checkpoint that loads without running code: {type(error).__name__}: {error!s:.200}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise PromptFileFormatError(
            f"{path} is not a checkpoint of the paper's program: it holds no state_dict of tensors."
        )
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_complex():
            raise PromptFileTensorError(f"{printable(name, 80)} of {path} must be dense, real and in the file.")
    # A tensor may claim any size with a stride of 0.
    size, claimed = path.stat().st_size, sum(tensor.nbytes for tensor in content.values())
    if claimed > size:
        raise PromptFileTensorError(f"The tensors of {path} claim {claimed} bytes, the file has {size}.")
    if broken := [name for name, tensor in content.items() if not bool(tensor.isfinite().all())]:
        raise PromptFileTensorError(f"{printable(broken[0], 80)} of {path} must hold finite values only.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _config(tensors: Mapping[str, Tensor], top_k: int, logit_scale: float) -> PromptConfig:
    depth, length, width = tensors["shared.prompts"].shape
    size, layers = tensors["pool.prompts"].shape[:2]
    classes, features = tensors["head.weight"].shape
    return PromptConfig(
        dim=width,
        depth=depth,
        num_classes=classes,
        feature_dim=features,
        prompt_length=length,
        shared_layers=max(depth - layers, 0),
        pool_size=size,
        top_k=top_k,
        logit_scale=logit_scale,
    )
