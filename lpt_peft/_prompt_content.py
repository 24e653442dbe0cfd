"""Conversion between adapters and `PromptContent`.

Not here: the public methods (`lpt_peft.pretrained`), the format (`lpt_peft.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lpt_peft.checkpoint import USAGE, CheckBackbone, PromptContent, check_match
from lpt_peft.config import PromptConfig
from lpt_peft.errors import BackboneMismatchError, ConfigError, InputError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.prompts import PromptPool, SharedPrompt

if TYPE_CHECKING:
    from lpt_peft.pretrained import PretrainedMixin

Part = Literal["all", "shared"]
_CAST_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def content_of(
    adapter: PretrainedMixin,
    *,
    class_counts: Iterable[int] | None = None,
    label_names: Iterable[str] | None = None,
    training: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> PromptContent:
    """Collect the content of an adapter's prompt file; the arguments replace what its `metadata` holds.

    Raises:
        InputError: An argument has the wrong type.
    """
    carried = adapter.metadata
    preprocessing = {**adapter.backbone.preprocess(), **carried.preprocess, **(preprocess or {})}
    return PromptContent(
        config=adapter.prompt_config,
        phase=adapter.phase,
        tensors={**adapter.adapter_state_dict(), **_usage(adapter)},
        metadata=replace(
            carried,
            class_counts=carried.class_counts if class_counts is None else _counts(class_counts),
            label_names=carried.label_names if label_names is None else _names(label_names),
            training=carried.training if training is None else training,
            preprocess=preprocessing,
            backbone_dtype=_backbone_dtype(adapter) or carried.backbone_dtype or "float32",
        ),
        backbone=adapter.backbone.info(),
        preprocess=preprocessing,
        # Not adapter.fingerprint, which does not notice changes through `.data`, as when PEFT merges.
        fingerprint=adapter.frozen_weights.compute_fingerprint(),
    )


def fill(adapter: PretrainedMixin, content: PromptContent) -> None:
    """Copy prompts and metadata into a new adapter of the same sizes, whose parameters take the file's dtypes."""
    for name in content.config.tensor_shapes:
        parameter = adapter.get_parameter(name)
        parameter.data = parameter.data.to(content.tensors[name].dtype)
    adapter.load_adapter_state_dict({name: content.tensors[name] for name in content.config.tensor_shapes})
    adapter.pool.load_usage(content.tensors.get(USAGE))
    adapter.phase = content.phase
    adapter.metadata = content.metadata


def replace_prompts(
    adapter: PretrainedMixin, content: PromptContent, *, part: Part = "all", check_backbone: CheckBackbone = "error"
) -> None:
    """Replace the prompts of an adapter; its ViT is not touched, and after an error nothing has changed.

    Args:
        adapter: Its ViT must be the backbone of the prompts.
        content: With `part="all"`, sizes, classes and dtypes may differ from the adapter's.
        part: "all" replaces prompts, head, phase and metadata, with new parameters, so make a new optimizer. "shared"
            copies only the shared prompts.
        check_backbone: As in `from_pretrained`.

    Raises:
        BackboneMismatchError: The prompts were trained on another backbone, or their sizes do not fit.
        ConfigError: An argument is out of range, or with `part="shared"` the shared prompts have another shape.
        StateError: The adapter was unwrapped.
    """
    if part not in ("all", "shared"):
        raise ConfigError(f'part={part!r} must be "all" or "shared".')
    if getattr(adapter, "vit", None) is None:
        raise StateError("This adapter was unwrapped; call LongTailPromptAdapter.from_pretrained(source, vit).")
    known = adapter.frozen_weights.fingerprint() if check_backbone != "off" else None
    check_match(content, adapter.backbone, check_backbone, known)
    if part == "shared":
        _copy_shared(adapter, content.tensors["shared.prompts"])
    else:
        _replace_all(adapter, content)


def _copy_shared(adapter: PretrainedMixin, prompts: torch.Tensor) -> None:
    parameter = adapter.get_parameter("shared.prompts")
    if parameter.shape != prompts.shape:
        raise ConfigError(
            f"The file's shared prompts are {tuple(prompts.shape)} (blocks, tokens, width), the adapter's "
            f'{tuple(parameter.shape)}, so they cannot be replaced alone. Load the whole file: part="all".'
        )
    if not bool(prompts.to(parameter.dtype).isfinite().all()):
        raise ConfigError(
            f"The file's shared prompts are too large for the adapter's {parameter.dtype}. Load the whole file, which "
            'has its own dtype: part="all".'
        )
    with torch.no_grad():
        parameter.copy_(prompts)


def _replace_all(adapter: PretrainedMixin, content: PromptContent) -> None:
    config, backbone = content.config, adapter.backbone
    found = (backbone.dim, len(backbone.blocks), backbone.feature_dim)
    if (config.dim, config.depth, config.feature_dim) != found:
        raise BackboneMismatchError(
            f"The prompts are for a ViT of width {config.dim}, {config.depth} blocks and feature width "
            f"{config.feature_dim}; this ViT has {found[0]}, {found[1]} and {found[2]}."
        )
    modules = _modules(config)
    for name, module in modules.items():
        reference: nn.Module = getattr(adapter, name)
        module.to(next(reference.parameters()).device).train(reference.training)
    for name in config.tensor_shapes:
        owner, _, leaf = name.partition(".")
        parameter = modules[owner].get_parameter(leaf)
        parameter.data = content.tensors[name].to(parameter.device, copy=True)
    modules["pool"].load_usage(content.tensors.get(USAGE))
    for name, module in modules.items():
        setattr(adapter, name, module)
    adapter.prompt_config = config
    adapter.metadata = content.metadata
    adapter.phase = content.phase


def _modules(config: PromptConfig) -> dict[str, Any]:
    assert config.feature_dim is not None  # noqa: S101 - set in __post_init__; narrows the type
    # Constructors draw initial values; loading must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        return {
            "shared": SharedPrompt(config.depth, config.prompt_length, config.dim),
            "pool": PromptPool.from_config(config),
            "head": CosineClassifier(config.feature_dim, config.num_classes, config.logit_scale),
        }


def _usage(adapter: PretrainedMixin) -> dict[str, torch.Tensor]:
    """Usage counts of the pool, if they are known."""
    usage = adapter.pool.usage
    return {USAGE: usage.clone()} if bool((usage >= 0).all()) else {}


def _backbone_dtype(adapter: PretrainedMixin) -> str | None:
    """Dtype of the frozen weights if they were cast; prompts loaded on float32 weights keep the record of their run."""
    return _CAST_DTYPES.get(next(adapter.vit.parameters()).dtype)


def _counts(values: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in values)
    except TypeError as error:
        raise InputError("class_counts must hold one integer, the training images, for each class.") from error


def _names(values: Iterable[str]) -> tuple[str, ...]:
    names = tuple(values)
    if isinstance(values, str) or not all(isinstance(name, str) for name in names):
        raise InputError('label_names must be a list with one text for each class, for example ["cat", "dog"].')
    return names
