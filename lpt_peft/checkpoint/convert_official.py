"""Checkpoints of the program published with the paper, to prompt files.

Such a file is a `torch.save`d dict with a `state_dict`: the backbone under timm's names, and four tensors of prompts.
Names and shapes are all that is known here; no code of that program is used. Not here: our own format (`schema.py`).
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
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones import BackboneInfo, find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.backbones.timm.from_state_dict import architecture_of, vit_from_weights
from lpt_peft.checkpoint.files import write_pair
from lpt_peft.checkpoint.prompt_file import encode
from lpt_peft.config import PromptConfig
from lpt_peft.errors import PromptFileFormatError, PromptFileNotFoundError, PromptFileTensorError

EPS = 1e-5
"""eps of that program's LayerNorms; timm's own is 1e-6."""

# Name there -> name and number of dimensions here.
_TENSORS = {
    "prompt_learner.Prompt_Tokens": ("shared.prompts", 3),
    "prompt_learner.Prompt_Tokens_pool": ("pool.prompts", 4),
    "prompt_learner.Prompt_Keys": ("pool.keys", 2),
    "prompt_learner.head.weight": ("head.weight", 2),
}


@dataclass(frozen=True, eq=False)
class Published:
    """What a published checkpoint holds.

    Attributes:
        adapter: The prompts on the backbone inside, phase "group", eval mode.
        architecture: timm's name for that backbone, or its class.
    """

    adapter: LongTailPromptAdapter
    architecture: str


def read_published(
    path: str | PathLike[str], *, num_heads: int | None = None, top_k: int = 2, logit_scale: float = 20.0
) -> Published:
    """Read a published checkpoint, with torch's loader that runs no code.

    Args:
        path: The .pth file.
        num_heads: Heads of the backbone; None is one for each 64 of its width.
        top_k: Groups chosen per image, which the file does not tell.
        logit_scale: Scale of the cosines, which it does not tell either.

    Raises:
        PromptFileNotFoundError: There is no such file.
        PromptFileFormatError: It is no such checkpoint, or loading it would run code.
        PromptFileTensorError: Its prompts do not fit each other, or hold NaN.
        BackboneError: Its other tensors are not those of a plain ViT.
        ConfigError: An argument is out of range.
    """
    state = _state_dict(Path(path))
    missing = [name for name in _TENSORS if name not in state]
    unknown = [name for name in state if name.startswith("prompt_learner.") and name not in _TENSORS]
    if missing or unknown:
        raise PromptFileFormatError(
            f"{path} is no checkpoint of the published program: it lacks {missing} and has unknown {unknown[:8]}."
        )
    tensors = {name: state.pop(theirs).float() for theirs, (name, _) in _TENSORS.items()}
    for theirs, (name, dimensions) in _TENSORS.items():
        if tensors[name].ndim != dimensions:
            raise PromptFileTensorError(
                f"{theirs} of {path} must have {dimensions} dimensions, not shape {tuple(tensors[name].shape)}."
            )
    tensors["head.weight"] = tensors["head.weight"].T.contiguous()  # (d, C) there
    vit = vit_from_weights(state, norm_eps=EPS, num_heads=num_heads)
    config = _config(tensors, top_k, logit_scale)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != config.tensor_shapes:
        raise PromptFileTensorError(f"The prompts of {path} do not fit each other: {shapes}.")
    with torch.random.fork_rng(devices=[]):
        adapter = LongTailPromptAdapter(find_backbone(vit), config).eval()
    adapter.load_adapter_state_dict(tensors)
    adapter.phase = "group"
    return Published(adapter, architecture_of(vit))


def write_published(
    published: Published, folder: str | PathLike[str], *, source: str, pretrained: nn.Module | None = None
) -> bool | None:
    """Write the prompt file of a published checkpoint.

    Args:
        published: From `read_published`.
        folder: Made if need be.
        source: Where the prompts come from, for the record.
        pretrained: What the backbone inside may be: the pretrained timm model of the same architecture.

    Returns:
        Whether the backbone inside has the weights of `pretrained`; None if there is nothing to compare with. Only if
        so does the file name them, and can be loaded without the backbone being given.
    """
    info = replace(published.adapter.backbone.info(), architecture=published.architecture, model_args={NORM_EPS: EPS})
    same = None
    if pretrained is not None:
        theirs = find_backbone(pretrained)
        same = fingerprint(theirs.frozen_tensors()) == published.adapter.fingerprint
        if same:
            info = _named(info, theirs.info())
    config, weights = encode(published.adapter, training={"converted_from": source}, backbone=info)
    write_pair(Path(folder), config, weights)
    return same


def _named(info: BackboneInfo, theirs: BackboneInfo) -> BackboneInfo:
    return replace(info, pretrained_tag=theirs.pretrained_tag, hub_id=theirs.hub_id, hub_revision=theirs.hub_revision)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PromptFileNotFoundError(f"{path} does not exist or is no file. Give the .pth file of the program.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch raise on bytes that are something else
        raise PromptFileFormatError(
            f"{path} is no checkpoint that loads without running code: {type(error).__name__}: {error!s:.200}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise PromptFileFormatError(f"{path} holds no state_dict of tensors, so it is no published checkpoint.")
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
