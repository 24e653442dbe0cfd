"""Conversion between adapters and `PromptContent`.

Not here: the public methods (`lpt_peft.pretrained`), the format (`lpt_peft.checkpoint`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from lpt_peft._classes import names_in_order
from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.base import execution_device
from lpt_peft.backbones.weights import cast_dtype
from lpt_peft.checkpoint import CheckBackbone, PromptContent, check_match
from lpt_peft.checkpoint.relabel import LabelChanges, relabel
from lpt_peft.config import PromptConfig
from lpt_peft.errors import BackboneError, BackboneMismatchError, ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.prompts import PromptPool, SharedPrompt

if TYPE_CHECKING:
    from lpt_peft.pretrained import PretrainedMixin

_Adapter = TypeVar("_Adapter", bound="PretrainedMixin")
Part = Literal["all", "shared"]


def content_of(
    adapter: PretrainedMixin,
    *,
    class_counts: Any = None,
    label_names: Any = None,
    training: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> PromptContent:
    """Collect the content of an adapter's prompt file; the arguments replace what its `metadata` holds.

    Raises:
        InputError: An argument has the wrong type or no order.
        StateError: The adapter was unwrapped, or is on the meta device.
    """
    _check_wrapped(adapter)
    carried = adapter.metadata
    if is_meta(adapter):
        raise StateError(
            "The prompts have no values: the ViT was on the meta device when it was wrapped. Wrap a ViT with weights."
        )
    preprocessing = {**adapter.preprocess(), **(preprocess or {})}
    tensors, router = adapter._file_tensors()
    return PromptContent(
        config=adapter.prompt_config,
        phase=adapter.phase,
        tensors=tensors,
        router=router,
        metadata=replace(
            carried.updated(
                class_counts=class_counts, label_names=label_names, training=training, preprocess=preprocessing
            ),
            backbone_dtype=cast_dtype(adapter.vit) or carried.backbone_dtype or "float32",
        ),
        backbone=adapter.backbone.info(),
        preprocess=preprocessing,
        # Not adapter.fingerprint, which does not notice changes through `.data`, as when PEFT merges.
        fingerprint=adapter.frozen_weights.compute_fingerprint(),
    )


def wrap_content(
    kind: type[_Adapter],
    content: PromptContent,
    vit: nn.Module,
    *,
    check_backbone: CheckBackbone,
    head_dropout: float,
) -> _Adapter:
    """Wrap a ViT with prompts, in an adapter of class `kind`, whose parameters take the dtypes of the prompts.

    Raises:
        BackboneError: The ViT cannot take prompts, is already wrapped, or is on the meta device.
        BackboneMismatchError: The prompts were trained on another backbone.
        ConfigError: An argument is out of range, or the sizes do not fit.
    """
    backbone = find_backbone(vit)
    if execution_device(vit).type == "meta":
        raise BackboneError(
            f"This {type(vit).__name__} has no weights: it is on the meta device. Build it outside of "
            'torch.device("meta"), or call vit.to_empty(device="cpu") and load its state dict, then load the prompts.'
        )
    check_match(content, backbone, check_backbone)
    construct: Any = kind
    # The constructor draws initial prompts; loading must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        adapter: _Adapter = construct(backbone, content.config, head_dropout=head_dropout)
    names = list(content.config.tensor_shapes)
    try:
        for name in names:
            parameter = adapter.get_parameter(name)
            parameter.data = parameter.data.to(content.tensors[name].dtype)
        own = adapter.adapter_state_dict()  # with the mark of the query, which is part of the configuration in a file
        adapter.load_adapter_state_dict({**own, **{name: content.tensors[name] for name in names}})
        adapter.phase = content.phase
        adapter._load_file_extras(content.tensors, content.router)
        adapter.metadata = content.metadata
    except BaseException:
        adapter.unwrap()
        raise
    return adapter


def replace_prompts(
    adapter: PretrainedMixin,
    content: PromptContent,
    *,
    part: Part = "all",
    label_names: Any = None,
    check_backbone: CheckBackbone = "error",
) -> LabelChanges | None:
    """Replace the prompts of an adapter; its ViT is not touched, and after an error nothing has changed.

    Args:
        adapter: Its ViT must be the backbone of the prompts.
        content: With `part="all"`, sizes, classes and dtypes may differ from the adapter's.
        part: "all" replaces prompts, head, phase and metadata, with new parameters, so make a new optimizer. "shared"
            copies only the shared prompts.
        label_names: Names of the classes that the head is for; rows of the file are matched by name. With "shared",
            these are the names of the adapter's own head, into which the rows of classes with the same name are copied.
        check_backbone: As in `from_pretrained`.

    Returns:
        The changes of the head, None without `label_names`.

    Raises:
        InputError: The names are invalid, or the file does not name its classes.
        BackboneMismatchError: The prompts were trained on another backbone, or their sizes do not fit.
        ConfigError: An argument is out of range, or with `part="shared"` the shared prompts have another shape.
        StateError: The adapter was unwrapped.
    """
    if part not in ("all", "shared"):
        raise ConfigError(f'part={part!r} must be "all" or "shared".')
    _check_wrapped(adapter)
    content, changes = with_classes(content, label_names)
    known = adapter.frozen_weights.fingerprint() if check_backbone != "off" else None
    check_match(content, adapter.backbone, check_backbone, known)
    if part == "shared":
        _copy_shared(adapter, content, changes)
    else:
        _replace_all(adapter, content)
    return changes


def mark_loaded(adapter: PretrainedMixin, content: PromptContent, source: object, part: Part = "all") -> None:
    """Record in `trained_parts` the parts that were loaded from a file; groups are trained in phase "group" only."""
    if part == "all":
        adapter.trained_parts.clear()
    adapter.trained_parts["shared"] = f"as loaded from {source}"
    if part == "all" and content.phase == "group":
        adapter.trained_parts["pool"] = f"as loaded from {source}"


def with_classes(
    content: PromptContent, label_names: Any, num_classes: int | None = None
) -> tuple[PromptContent, LabelChanges | None]:
    """Match head rows by name, unless `label_names` is None, and check the number of classes.

    Raises:
        InputError: The names are invalid, or the file does not name its classes.
        ConfigError: `num_classes` is not the number of classes.
    """
    changes = None
    if label_names is not None:
        content, changes = relabel(content, names_in_order(label_names))
    if num_classes not in (None, content.config.num_classes):
        raise ConfigError(
            f"num_classes={num_classes!r}, but the head of the prompts has {content.config.num_classes} classes. For "
            "other classes give label_names=[...], which keeps the rows of classes with the same name; for a new head, "
            'wrap(vit, num_classes=...) and load_prompts(source, part="shared").'
        )
    return content, changes


def warn_of(changes: LabelChanges | None, before: int = 0, after: int = 0) -> LabelChanges | None:
    """Warn the caller of the calling method if the classes of the head changed; return the changes.

    Args:
        changes: Classes that are new or dropped; None if the head was replaced without comparing names.
        before: Number of classes before the head was replaced.
        after: Number of classes since then.
    """
    if changes is not None and (changes.new or changes.dropped):
        warnings.warn(str(changes), UserWarning, stacklevel=3)
    elif changes is None and before != after:
        warnings.warn(
            f"The head had {before} classes and was replaced by that of the prompts, which has {after}: labels, class "
            "counts and metrics must be of these classes. To keep the classes of this adapter, give label_names=[...], "
            'or part="shared".',
            UserWarning,
            stacklevel=3,
        )
    return changes


def is_meta(adapter: PretrainedMixin) -> bool:
    """Whether prompts or head have no values."""
    return any(parameter.is_meta for parameter in adapter.shared.parameters())


def _check_wrapped(adapter: PretrainedMixin) -> None:
    if getattr(adapter, "vit", None) is None:
        raise StateError("This adapter was unwrapped; wrap a ViT, or call LongTailPromptAdapter.from_pretrained.")


def _copy_shared(adapter: PretrainedMixin, content: PromptContent, changes: LabelChanges | None) -> None:
    prompts, parameter = content.tensors["shared.prompts"], adapter.get_parameter("shared.prompts")
    head = adapter.get_parameter("head.weight")
    rows = [] if changes is None else [label for label, row in enumerate(changes.rows) if row is not None]
    if changes is not None and tuple(head.shape) != tuple(content.tensors["head.weight"].shape):
        raise ConfigError(
            f"label_names has {len(changes.rows)} names, but the adapter's head has {head.shape[0]} classes. With "
            'part="shared" give the names of the classes of that head, in order.'
        )
    pairs = [(prompts, parameter), (content.tensors["head.weight"][rows], head)]
    if parameter.shape != prompts.shape:
        raise ConfigError(
            f"The file's shared prompts are {tuple(prompts.shape)} (blocks, tokens, width), the adapter's "
            f'{tuple(parameter.shape)}, so they cannot be replaced alone. Load the whole file: part="all".'
        )
    if not all(bool(given.to(own.dtype).isfinite().all()) for given, own in pairs):
        raise ConfigError(
            f"The file's prompts or head are too large for the adapter's {parameter.dtype}. Load the whole file, which "
            'has its own dtype: part="all".'
        )
    with torch.no_grad():
        parameter.copy_(prompts)
        head[rows] = content.tensors["head.weight"][rows].to(head)
    adapter._drop_router("it predicts queries under the shared prompts that were replaced.")


def _replace_all(adapter: PretrainedMixin, content: PromptContent) -> None:
    config, backbone = content.config, adapter.backbone
    found = (backbone.dim, len(backbone.blocks), backbone.feature_dim)
    if (config.dim, config.depth, config.feature_dim) != found:
        raise BackboneMismatchError(
            f"The prompts are for a ViT of width {config.dim}, {config.depth} blocks and feature width "
            f"{config.feature_dim}; this ViT has {found[0]}, {found[1]} and {found[2]}."
        )
    modules = _modules(config)
    device, training = adapter.head.weight.device, adapter.head.training
    for module in modules.values():
        if module is not None:
            module.to(device).train(training)
    for name in config.tensor_shapes:
        owner, _, leaf = name.partition(".")
        parameter = modules[owner].get_parameter(leaf)
        parameter.data = content.tensors[name].to(parameter.device, copy=True)
    for name, module in modules.items():
        setattr(adapter, name, module)
    adapter.prompt_config = config
    adapter._mark_query()
    adapter.metadata = content.metadata
    adapter.phase = content.phase
    adapter._load_file_extras(content.tensors, content.router)


def _modules(config: PromptConfig) -> dict[str, Any]:
    assert config.feature_dim is not None  # noqa: S101 - set in __post_init__; narrows the type
    # Constructors draw initial values; loading must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        return {
            "shared": SharedPrompt(*config.tensor_shapes["shared.prompts"]),
            "pool": PromptPool.from_config(config) if config.has_groups else None,
            "head": CosineClassifier(config.feature_dim, config.num_classes, config.logit_scale),
        }
