"""Limits of the writer, tried before a training starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lpt_peft._classes import integers_in_order, names_in_order
from lpt_peft._json import BrokenRule
from lpt_peft.backbones import BackboneInfo
from lpt_peft.checkpoint.content import USAGE, PromptContent
from lpt_peft.checkpoint.schema import DTYPE_BYTES, content_to_config
from lpt_peft.checkpoint.tensors import encode_header
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import InputError

_PREPROCESS = {
    "input_size": [3, 224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_RESERVED_BYTES = 4096  # for the description of the backbone, which is not known here


def check_writable(
    prompt_config: PromptConfig,
    *,
    class_counts: Any = None,
    label_names: Any = None,
    training: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> None:
    """Check that `save_pretrained` will accept these arguments, before a training starts.

    Every limit is tried: lengths and characters of names, numbers of entries, plain JSON, 64 KiB of `training`, 1 MiB
    of header, and the size of all tensors. Values that only the training produces, such as NaN in a prompt, are not
    checked.

    Args:
        prompt_config: Sizes of prompts and head.
        class_counts: As in `save_pretrained`.
        label_names: As in `save_pretrained`.
        training: As in `save_pretrained`; figures of the results may be represented by placeholders of their length.
        preprocess: As in `save_pretrained`.

    Raises:
        InputError: `save_pretrained` would refuse an argument.

    Example:
        >>> config = PromptConfig(dim=768, depth=12, num_classes=2)
        >>> check_writable(config, class_counts=[90, 3], label_names=["cat", "dog"])
        >>> check_writable(config, label_names=["cat", ""])
        Traceback (most recent call last):
        lpt_peft.errors.InputError: These prompts cannot be saved: head.label_names[1]='' must be text of 1 to 1024 ...
    """
    names = None if label_names is None else names_in_order(label_names)
    counts = None if class_counts is None else integers_in_order(class_counts, label_names=names)
    content = PromptContent(
        config=prompt_config,
        phase="group" if prompt_config.has_groups else "shared",
        tensors={},
        metadata=PromptMetadata(class_counts=counts, label_names=names, training=training or {}),
        backbone=BackboneInfo(
            library="-",
            library_version="-",
            architecture="-",
            embed_dim=prompt_config.dim,
            depth=prompt_config.depth,
            num_heads=1,
            num_parameters=1,
            model_args={f"reserved_{part}": "-" * 1000 for part in range(_RESERVED_BYTES // 1000)},
        ),
        preprocess={**_PREPROCESS, **(preprocess or {})},
        fingerprint="0" * 64,
    )
    shapes = dict(prompt_config.tensor_shapes)
    if prompt_config.has_groups:
        shapes[USAGE] = (prompt_config.pool_size,)
    tensors = {name: {"dtype": "I64" if name == USAGE else "F32", "shape": list(shapes[name])} for name in shapes}
    try:
        config = content_to_config(content, tensors)
    except BrokenRule as error:
        raise InputError(f"These prompts cannot be saved: {error}.") from error
    end, entries = 0, {}
    for name, spec in tensors.items():
        start, end = end, end + DTYPE_BYTES[str(spec["dtype"])] * math.prod(shapes[name])
        entries[name] = {**spec, "data_offsets": [start, end]}
    encode_header(entries, {**config, "data_sha256": "0" * 64})
