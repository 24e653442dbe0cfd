"""Configuration in the header of a prompt file, format version 2: its schema, and conversion from and to content.

The key sets are closed, because an unknown key might change the meaning of the rest. Not here: JSON itself
(`lpt_peft._json`), the safetensors header around the configuration (`tensors.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lpt_peft._json import (
    BrokenRule,
    integer,
    list_of,
    mapping_of,
    object_of,
    one_of,
    sha256,
)
from lpt_peft._version import __version__
from lpt_peft.checkpoint.content import ROUTER, USAGE, PromptContent
from lpt_peft.checkpoint.description import (
    DESCRIPTION,
    SIZE,
    check_description,
    content_fields,
    describe_content,
    plain_json,
)
from lpt_peft.config import PHASES, PLACEMENTS, QUERIES, PromptConfig
from lpt_peft.errors import ConfigError, PromptFileFormatError, PromptFileTensorError, PromptFileVersionError
from lpt_peft.router import MAX_SEED, MAX_WIDTH, RouterLayout, router_shapes

FORMAT = "lpt_peft-prompts"
FORMAT_VERSION = 2
MAX_TENSOR_BYTES = 2**34  # 16 GiB: a million classes of width 4096 in float32
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}


_PROMPT_SIZES = ("prompt_length", "shared_layers", "pool_size", "top_k", "dim", "depth")
_PROMPT_CHOICES: Mapping[str, tuple[str, ...]] = {"query": QUERIES, "placement": PLACEMENTS}
"""Optional keys of `prompt`; the first choice is the default and is not written."""
_CONTENT = {
    "format": one_of(FORMAT),
    "format_version": integer(FORMAT_VERSION, FORMAT_VERSION),
    **DESCRIPTION,
    "prompt": object_of(
        {**dict.fromkeys(_PROMPT_SIZES, integer(0, 10**6)), "phase": one_of(*PHASES)},
        {name: one_of(*choices) for name, choices in _PROMPT_CHOICES.items()},
    ),
    "tensors": mapping_of(object_of({"dtype": one_of(*DTYPE_BYTES), "shape": list_of(SIZE, 1, 8)}), most=64),
}
_ROUTER = {"blocks": integer(1, 10**6), "width": integer(0, MAX_WIDTH), "seed": integer(0, MAX_SEED)}
_OPTIONAL = {"router": object_of(_ROUTER)}
_CONTENT_RULE = object_of(_CONTENT, _OPTIONAL)
_CONFIG_RULE = object_of({**_CONTENT, "data_sha256": sha256}, _OPTIONAL)


def content_to_config(content: PromptContent, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Convert content to the configuration without `data_sha256`, as plain JSON values.

    Args:
        content: Its tensors are not read.
        tensors: dtype and shape of each tensor, as in the header.

    Raises:
        BrokenRule: A value, or several values together, do not fit the format.
    """
    sizes = content.config.to_dict()
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": content.library_version,
        "prompt": {
            **{name: sizes[name] for name in _PROMPT_SIZES},
            "phase": content.phase,
            **{name: sizes[name] for name, choices in _PROMPT_CHOICES.items() if sizes[name] != choices[0]},
        },
        **describe_content(content, sizes["num_classes"], sizes["logit_scale"]),
        "tensors": tensors,
        **({} if content.router is None else {"router": content.router._asdict()}),
    }
    checked = plain_json(config)
    _CONTENT_RULE(checked, "")
    _check_together(checked)
    if (size := tensor_bytes(checked)) > MAX_TENSOR_BYTES:
        raise BrokenRule(
            f"the tensors take {size} bytes, at most {MAX_TENSOR_BYTES} are read; use a smaller pool, shorter prompts "
            "or fewer classes"
        )
    return checked


def config_to_content(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptContent:
    """Convert a checked configuration and the tensors of the file to content."""
    return PromptContent(
        config=prompt_config(config),
        phase=config["prompt"]["phase"],
        tensors=tensors,
        router=RouterLayout(**config["router"]) if "router" in config else None,
        **content_fields(config),
    )


def check_version(config: Mapping[str, Any]) -> None:
    """Check that a configuration is of a prompt file of this format version.

    Raises:
        PromptFileFormatError: It is of another kind of file.
        PromptFileVersionError: It has another format version.
    """
    if config.get("format") != FORMAT:
        raise PromptFileFormatError(f'This is not a prompt file: its configuration has no "format": "{FORMAT}".')
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version == FORMAT_VERSION:
        return
    cure = "Upgrade lpt_peft: pip install -U lpt_peft" if version > FORMAT_VERSION else "Save the prompts again"
    raise PromptFileVersionError(
        f"This prompt file has format version {version}; lpt_peft {__version__} reads {FORMAT_VERSION}. {cure}."
    )


def check_config(config: Mapping[str, Any]) -> None:
    """Check the configuration of a file: every key, and what they mean together.

    Raises:
        PromptFileFormatError: A key or value breaks the format.
        PromptFileTensorError: The tensors that it lists are not those that its own sizes require.
    """
    try:
        _CONFIG_RULE(config, "")
        _check_together(config)
    except BrokenRule as error:
        raise PromptFileFormatError(
            f"The configuration of the prompt file breaks the format: {error}. Save or fetch the file again."
        ) from error
    _check_tensors(config)


def prompt_config(config: Mapping[str, Any]) -> PromptConfig:
    """Sizes of prompts and head in a configuration; the width of the features is that of the class vectors.

    Raises:
        ConfigError: A size is out of range.
    """
    sizes = {name: config["prompt"][name] for name in _PROMPT_SIZES}
    sizes |= {name: config["prompt"].get(name, choices[0]) for name, choices in _PROMPT_CHOICES.items()}
    head_shape = config["tensors"].get("head.weight", {}).get("shape", [None])
    return PromptConfig(
        **sizes,
        num_classes=config["head"]["num_classes"],
        logit_scale=config["head"]["logit_scale"],
        feature_dim=head_shape[-1],
    )


def tensor_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of all tensors in a configuration, without the header."""
    return sum(DTYPE_BYTES[spec["dtype"]] * math.prod(spec["shape"]) for spec in config["tensors"].values())


def _check_together(config: Mapping[str, Any]) -> None:
    try:
        sizes = prompt_config(config)
    except ConfigError as error:
        raise BrokenRule(f"prompt and head do not fit: {error}") from error
    if config["prompt"]["phase"] == "group" and not sizes.has_groups:
        raise BrokenRule('prompt.phase is "group", and prompt.placement "shallow" has no groups')
    backbone = config["backbone"]
    if (backbone["embed_dim"], backbone["depth"]) != (sizes.dim, sizes.depth):
        raise BrokenRule("prompt.dim and prompt.depth must be the backbone's embed_dim and depth")
    if "router" in config and (sizes.query != "final" or config["prompt"]["phase"] != "group"):
        raise BrokenRule('router is for prompts of phase "group" with the final query')
    if "router" in config and config["router"]["blocks"] > (most := max(1, sizes.first_group_layer)):
        raise BrokenRule(f"router.blocks must be at most {most}, the block boundaries before the first group prompts")
    check_description(config)


def _router_shapes(config: Mapping[str, Any], sizes: PromptConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the router's tensors, if the configuration has a router."""
    if "router" not in config:
        return {}
    columns = config["tensors"].get(ROUTER[0], {}).get("shape", [0])[-1]
    shapes = router_shapes(RouterLayout(**config["router"]), sizes.pool_size, sizes.dim, columns)
    return dict(zip(ROUTER, shapes, strict=True))


def _check_tensors(config: Mapping[str, Any]) -> None:
    sizes = prompt_config(config)
    needed, listed = sizes.tensor_shapes, config["tensors"]
    usage = {USAGE: (sizes.pool_size,)} if USAGE in listed and sizes.has_groups else {}
    shapes = {**needed, **usage, **_router_shapes(config, sizes)}
    if listed.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - listed.keys()), sorted(listed.keys() - shapes.keys())
        raise PromptFileTensorError(
            f"A prompt file must list the tensors {list(needed)}; missing {missing}, unknown {extra[:8]}."
        )
    for name, shape in shapes.items():
        found, dtype = tuple(listed[name]["shape"]), listed[name]["dtype"]
        if found != shape:
            raise PromptFileTensorError(
                f"The configuration lists {name} with shape {found}; its prompt and head sizes need {shape}."
            )
        if (dtype == "I64") != (name == USAGE):
            kinds = "I64" if name == USAGE else "F32, F16 or BF16"
            raise PromptFileTensorError(f"The configuration lists {name} as {dtype}; it must be {kinds}.")
    if (size := tensor_bytes(config)) > MAX_TENSOR_BYTES:
        raise PromptFileTensorError(f"The tensors take {size} bytes, at most {MAX_TENSOR_BYTES} are read.")
