"""What the configurations of prompt files and model files share: head, classes, preprocessing, backbone, training.

The key sets are closed, because an unknown key might change the meaning of the rest. Not here: the rest of a prompt
file's configuration (`schema.py`) and of a model file's (`model_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from lpt_peft._json import (
    BrokenRule,
    Rule,
    boolean,
    dumps,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    object_of,
    one_of,
    parse,
    positive,
    primitive,
    require,
    sha256,
    text,
)
from lpt_peft._text import control_character
from lpt_peft.backbones import BackboneInfo
from lpt_peft.backbones.fingerprint import ALGORITHM
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.checkpoint.plain_json import broken_entry
from lpt_peft.config import MAX_CLASSES, PromptMetadata

MAX_TRAINING_BYTES = 2**16
SIZE = integer(1, 10**6)


class Described(Protocol):
    """Content of a file, as far as `describe_content` reads it."""

    @property
    def metadata(self) -> PromptMetadata:
        """Classes and training record."""

    @property
    def backbone(self) -> BackboneInfo:
        """Model of the training."""

    @property
    def preprocess(self) -> Mapping[str, Any]:
        """How images become tensors."""

    @property
    def fingerprint(self) -> str:
        """Hash of that model's weights."""


def _label_name(value: Any, path: str) -> None:
    text(value, path)
    if (found := control_character(value)) is not None:
        raise BrokenRule(f"{path}={value!r:.80} must not contain control characters, but contains {found}")


_BACKBONE = {
    **dict.fromkeys(("library", "library_version", "architecture"), text),
    **dict.fromkeys(("pretrained_tag", "hub_id", "hub_revision"), nullable(text)),
    **dict.fromkeys(("embed_dim", "depth", "num_heads"), SIZE),
    "num_parameters": integer(0),
    "model_args": mapping_of(primitive, most=64),
    "fingerprint": sha256,
    "fingerprint_algorithm": one_of(ALGORITHM),
}
_PREPROCESS = {
    "input_size": list_of(SIZE, 3, 3),
    "mean": list_of(number, 1, 64),
    "std": list_of(positive, 1, 64),
    "interpolation": text,
    "crop_pct": positive,
    "crop_mode": text,
}
_PREPROCESS_OPTIONAL = {"exif": boolean, "background": list_of(integer(0, 255), 3, 3)}
_HEAD = {
    "num_classes": integer(1, MAX_CLASSES),
    "logit_scale": positive,
    "label_names": nullable(list_of(_label_name, 1, MAX_CLASSES)),
}
DESCRIPTION: dict[str, Rule] = {
    "library_version": text,
    "head": object_of(_HEAD, {"temperature": positive}),
    "class_counts": nullable(list_of(integer(0), 1, MAX_CLASSES)),
    "preprocess": object_of(_PREPROCESS, _PREPROCESS_OPTIONAL),
    "backbone": object_of(_BACKBONE, {"dtype": one_of("float32", "float16", "bfloat16")}),
    "training": mapping_of(lambda value, path: None, most=MAX_TRAINING_BYTES),
}
"""Rules of the keys that `describe_content` returns, and of `library_version`."""


def describe_content(content: Described, num_classes: int, logit_scale: float) -> dict[str, Any]:
    """Convert the shared part of a content to entries of its configuration.

    Args:
        content: What to describe.
        num_classes: Of the head.
        logit_scale: Of the head.
    """
    metadata = content.metadata
    optional = {"temperature": metadata.temperature}
    head = {"num_classes": num_classes, "logit_scale": logit_scale, "label_names": metadata.label_names}
    return {
        "head": {**head, **_given(optional)},
        "class_counts": metadata.class_counts,
        "preprocess": content.preprocess,
        "backbone": {
            **asdict(content.backbone),
            "fingerprint": content.fingerprint,
            "fingerprint_algorithm": ALGORITHM,
            **_given({"dtype": metadata.backbone_dtype}),
        },
        "training": metadata.training,
    }


def plain_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a configuration through JSON and back: rules then see what a reader sees, with lists for tuples.

    Raises:
        BrokenRule: A value is not plain JSON.
    """
    try:
        checked: dict[str, Any] = parse(dumps(config).encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        found = broken_entry({key: value for key, value in config.items() if key != "tensors"})
        raise BrokenRule(found or f"training, label_names and class_counts must be plain JSON: {error}") from error
    return checked


def check_description(config: Mapping[str, Any]) -> None:
    """Check what the shared entries mean together; each of them follows its rule already.

    Raises:
        BrokenRule: They do not fit together.
    """
    num_classes = config["head"]["num_classes"]
    for path, values in (("class_counts", config["class_counts"]), ("head.label_names", config["head"]["label_names"])):
        if values is not None and len(values) != num_classes:
            raise BrokenRule(f"{path} has {len(values)} entries, the head has {num_classes} classes")
    backbone, preprocess = config["backbone"], config["preprocess"]
    if NORM_EPS in backbone["model_args"]:
        positive(backbone["model_args"][NORM_EPS], f"backbone.model_args.{NORM_EPS}")
    fits = len(preprocess["mean"]) == len(preprocess["std"])
    require(fits, preprocess["std"], "preprocess.std", "of the length of preprocess.mean")
    size = len(dumps(config["training"]).encode("utf-8"))
    if size > MAX_TRAINING_BYTES:
        raise BrokenRule(f"training has {size} bytes of JSON, at most {MAX_TRAINING_BYTES} are kept")


def content_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the shared entries of a checked configuration to fields of a content."""
    backbone, head = dict(config["backbone"]), config["head"]
    fingerprint = backbone.pop("fingerprint")
    del backbone["fingerprint_algorithm"]
    dtype = backbone.pop("dtype", None)
    counts, names = config["class_counts"], head["label_names"]
    return {
        "metadata": PromptMetadata(
            class_counts=None if counts is None else tuple(counts),
            label_names=None if names is None else tuple(names),
            training=config["training"],
            preprocess=config["preprocess"],
            temperature=head.get("temperature"),
            backbone_dtype=dtype,
        ),
        "backbone": BackboneInfo(**backbone),
        "preprocess": config["preprocess"],
        "fingerprint": fingerprint,
        "library_version": config["library_version"],
    }


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
