"""config.json of a prompt file: build it from an adapter, parse it strictly, check it whole (format version 1).

The key sets are closed: an unknown key might change the meaning of the rest. Not here: JSON itself
(`strict_json.py`), the other file (`tensors.py`), and what the values mean to a backbone (`pretrained.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lpt_peft._version import __version__
from lpt_peft.adapter import PHASES, LongTailPromptAdapter
from lpt_peft.backbones import BackboneInfo
from lpt_peft.backbones.fingerprint import ALGORITHM
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.checkpoint.rules import (
    BrokenRule,
    items,
    nullable,
    number,
    one_of,
    positive,
    primitive,
    record,
    require,
    sha256,
    table,
    text,
    whole,
)
from lpt_peft.checkpoint.strict_json import dumps, loads, parse
from lpt_peft.config import MAX_CLASSES, PromptConfig, PromptMetadata
from lpt_peft.errors import ConfigError, PromptFileFormatError, PromptFileTensorError, PromptFileVersionError

FORMAT = "lpt_peft-prompts"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
MAX_TRAINING_BYTES = 2**16
MAX_TENSOR_BYTES = 2**34  # 16 GiB: a million classes of width 4096 in float32
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_SIZE = whole(1, 10**6)
_BACKBONE = {
    **dict.fromkeys(("library", "library_version", "architecture"), text),
    **dict.fromkeys(("pretrained_tag", "hub_id", "hub_revision"), nullable(text)),
    **dict.fromkeys(("embed_dim", "depth", "num_heads"), _SIZE),
    "num_parameters": whole(0),
    "model_args": table(primitive, most=64),
    "fingerprint": sha256,
    "fingerprint_algorithm": one_of(ALGORITHM),
}
_PREPROCESS = {
    "input_size": items(_SIZE, 3, 3),
    "mean": items(number, 1, 64),
    "std": items(positive, 1, 64),
    "interpolation": text,
    "crop_pct": positive,
    "crop_mode": text,
}
_PROMPT_SIZES = ("prompt_length", "shared_layers", "pool_size", "top_k", "dim", "depth")
_CONTENT = {
    "format": one_of(FORMAT),
    "format_version": whole(FORMAT_VERSION, FORMAT_VERSION),
    "library_version": text,
    "prompt": record({**dict.fromkeys(_PROMPT_SIZES, whole(0, 10**6)), "phase": one_of(*PHASES)}),
    "head": record(
        {
            "num_classes": whole(1, MAX_CLASSES),
            "logit_scale": positive,
            "label_names": nullable(items(text, 1, MAX_CLASSES)),
        }
    ),
    "class_counts": nullable(items(whole(0), 1, MAX_CLASSES)),
    "preprocess": record(_PREPROCESS),
    "backbone": record(_BACKBONE),
    "tensors": table(record({"dtype": one_of(*DTYPE_BYTES), "shape": items(_SIZE, 1, 8)}), most=64),
    "training": table(lambda value, path: None, most=MAX_TRAINING_BYTES),
}
_CONTENT_RULE = record(_CONTENT)
_CONFIG_RULE = record({**_CONTENT, "weights": record({"size": whole(8), "sha256": sha256})})


def build_content(
    adapter: LongTailPromptAdapter,
    tensors: Mapping[str, Mapping[str, Any]],
    metadata: PromptMetadata,
    backbone: BackboneInfo,
) -> dict[str, Any]:
    """All of config.json but `weights`, as plain JSON values.

    Args:
        adapter: Whose prompts these are.
        tensors: Name to dtype and shape, as in the file.
        metadata: What the adapter itself does not need.
        backbone: Which model the adapter is on.

    Raises:
        BrokenRule: A value, or all of them together, does not fit the format.
    """
    sizes = adapter.prompt_config.to_dict()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "prompt": {**{name: sizes[name] for name in _PROMPT_SIZES}, "phase": adapter.phase},
        "head": {
            "num_classes": adapter.prompt_config.num_classes,
            "logit_scale": adapter.prompt_config.logit_scale,
            "label_names": metadata.label_names,
        },
        "class_counts": metadata.class_counts,
        "preprocess": adapter.backbone.preprocess(),
        "backbone": {
            **asdict(backbone),
            # Not adapter.fingerprint, which changes through `.data` (PEFT merges so) would leave as it was.
            "fingerprint": adapter.frozen_weights.compute_fingerprint(),
            "fingerprint_algorithm": ALGORITHM,
        },
        "tensors": tensors,
        "training": metadata.training,
    }
    try:
        # Through JSON and back: checked is what a reader will see, with lists for tuples and text for keys.
        checked: dict[str, Any] = parse(dumps(content).encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokenRule(f"training, label_names and class_counts must be plain JSON: {error}") from error
    _CONTENT_RULE(checked, "")
    _check_together(checked)
    return checked


def parse_config(data: bytes) -> dict[str, Any]:
    """The bytes of config.json to its checked content.

    Raises:
        PromptFileFormatError: Larger than 1 MiB, not strict JSON, or a key or value breaks the format.
        PromptFileVersionError: Written by a later format version.
        PromptFileTensorError: The tensors it lists are not those that its own sizes need.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise PromptFileFormatError(f"config.json has {len(data)} bytes, at most {MAX_CONFIG_BYTES} are read.")
    config = loads(data, "config.json")
    if config.get("format") != FORMAT:
        raise PromptFileFormatError(f'config.json is not of a prompt file: it has no "format": "{FORMAT}".')
    version = config.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise PromptFileVersionError(
            f"This prompt file has format version {version}; lpt_peft {__version__} reads {FORMAT_VERSION}. "
            "Upgrade lpt_peft: pip install -U lpt_peft."
        )
    try:
        _CONFIG_RULE(config, "")
        _check_together(config)
    except BrokenRule as error:
        raise PromptFileFormatError(f"config.json breaks the format: {error}. Save or fetch the file anew.") from error
    _check_tensors(config)
    return config


def prompt_config(config: Mapping[str, Any]) -> PromptConfig:
    """The sizes that a config.json declares.

    The width of the pooled feature has no key of its own: it is that of the class vectors.

    Raises:
        ConfigError: A size is out of its range.
    """
    sizes = {name: config["prompt"][name] for name in _PROMPT_SIZES}
    head_shape = config["tensors"].get("head.weight", {}).get("shape", [None])
    return PromptConfig(
        **sizes,
        num_classes=config["head"]["num_classes"],
        logit_scale=config["head"]["logit_scale"],
        feature_dim=head_shape[-1],
    )


def tensor_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of all tensors that a config.json lists, without the header."""
    return sum(DTYPE_BYTES[spec["dtype"]] * math.prod(spec["shape"]) for spec in config["tensors"].values())


def _check_together(config: Mapping[str, Any]) -> None:
    """The rules that concern several keys at once."""
    try:
        sizes = prompt_config(config)
    except ConfigError as error:
        raise BrokenRule(f"prompt and head do not fit: {error}") from error
    for path, values in (("class_counts", config["class_counts"]), ("head.label_names", config["head"]["label_names"])):
        if values is not None and len(values) != sizes.num_classes:
            raise BrokenRule(f"{path} has {len(values)} entries, the head has {sizes.num_classes} classes")
    backbone, preprocess = config["backbone"], config["preprocess"]
    if (backbone["embed_dim"], backbone["depth"]) != (sizes.dim, sizes.depth):
        raise BrokenRule("prompt.dim and prompt.depth must be the backbone's embed_dim and depth")
    if NORM_EPS in backbone["model_args"]:
        positive(backbone["model_args"][NORM_EPS], f"backbone.model_args.{NORM_EPS}")
    fits = len(preprocess["mean"]) == len(preprocess["std"])
    require(fits, preprocess["std"], "preprocess.std", "of the length of preprocess.mean")
    size = len(dumps(config["training"]).encode("utf-8"))
    if size > MAX_TRAINING_BYTES:
        raise BrokenRule(f"training has {size} bytes of JSON, at most {MAX_TRAINING_BYTES} are kept")


def _check_tensors(config: Mapping[str, Any]) -> None:
    """The listed tensors are those that the sizes need, and not absurdly large."""
    declared = {name: tuple(spec["shape"]) for name, spec in config["tensors"].items()}
    needed = prompt_config(config).tensor_shapes
    if declared.keys() != needed.keys():
        missing, extra = sorted(needed.keys() - declared.keys()), sorted(declared.keys() - needed.keys())
        raise PromptFileTensorError(
            f"config.json must list the tensors {list(needed)}; missing {missing}, unknown {extra[:8]}."
        )
    for name, shape in needed.items():
        if declared[name] != shape:
            raise PromptFileTensorError(
                f"config.json lists {name} with shape {declared[name]}; its prompt and head sizes need {shape}."
            )
    content, size = tensor_bytes(config), config["weights"]["size"]
    if content > MAX_TENSOR_BYTES:
        raise PromptFileTensorError(f"The tensors take {content} bytes, at most {MAX_TENSOR_BYTES} are read.")
    if not content + 8 < size <= content + 8 + MAX_HEADER_BYTES:
        raise PromptFileTensorError(
            f"config.json gives prompts.safetensors {size} bytes; its tensors take {content} and the header at most "
            f"{MAX_HEADER_BYTES} more."
        )
