"""Build the pretrained backbone that a prompt file names, from what the installed library lists and nothing else.

The names come from anyone, so they choose among what is here: no code, address or size of theirs is used.
Not here: whether the weights are those the prompts were learnt on; the fingerprint tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
from torch import nn

from lpt_peft._text import printable
from lpt_peft.errors import ConfigError

MAX_IMAGE_SIZE = 2048
NORM_EPS = "norm_eps"
"""Beside timm's own arguments: eps of every LayerNorm, where it is not the architecture's."""

# Arguments that pretrained weights can follow, besides img_size and norm_eps.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "dynamic_img_size": (True, False),
    "dynamic_img_pad": (True, False),
    "global_pool": ("token", "avg", "avgmax", "max"),
}


def build(info: Mapping[str, Any]) -> nn.Module:
    """The pretrained model in eval mode, downloaded if need be.

    Args:
        info: `backbone` of a checked config.json.

    Raises:
        ConfigError: The installed library has no such model or weights, or it cannot have these arguments.
        Exception: Whatever the library raises when the download fails.
    """
    return _plan(info)()


def can_build(info: Mapping[str, Any]) -> bool:
    """Whether `build` would try, or refuse before any download."""
    try:
        _plan(info)
    except ConfigError:
        return False
    return True


def _plan(info: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """What would build the model."""
    if info["library"] == "timm":
        name, arguments = _plan_timm(info)
        return lambda: timm.create_model(name, pretrained=True, **arguments).eval()
    if info["library"] != "transformers":
        raise _refusal(info, f'models of "{info["library"]:.40}" are not built here')
    if find_spec("transformers") is None:
        raise _refusal(info, 'transformers is not installed (pip install "lpt_peft[transformers]")')
    try:
        builder = import_module("lpt_peft.backbones.transformers.loading")  # an optional extra
    except ImportError as error:  # it is there, and does not go with this huggingface_hub or torch
        raise _refusal(info, f"transformers cannot be imported ({error!s:.120})") from error
    if (why := builder.why_not(info)) is not None:
        raise _refusal(info, why)
    return partial(builder.load, info)


def _plan_timm(info: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments for timm, out of its own list."""
    architecture, tag = info["architecture"], info["pretrained_tag"]
    if architecture not in timm.list_models():
        raise _refusal(info, f"timm {timm.__version__} has no such architecture")
    if tag is None or f"{architecture}.{tag}" not in timm.list_models(pretrained=True):
        raise _refusal(info, f"timm {timm.__version__} has no pretrained weights of that tag")
    return f"{architecture}.{tag}", _arguments(info)


def _arguments(info: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the file that pretrained weights can follow; any other is refused."""
    arguments: dict[str, Any] = {}
    for name, value in info["model_args"].items():
        if name == "img_size":
            arguments[name] = _image_size(info, value)
        elif name == NORM_EPS:
            arguments["norm_layer"] = partial(nn.LayerNorm, eps=_eps(info, value))
        elif name in _CHOICES and value in _CHOICES[name]:
            arguments[name] = value
        else:
            raise _refusal(info, f"pretrained weights cannot follow its {name:.60}={value!r:.60}")
    return arguments


def _image_size(info: Mapping[str, Any], value: Any) -> tuple[int, int]:
    sizes = value if isinstance(value, list) else [value, value]
    if len(sizes) != 2 or not all(type(size) is int and 1 <= size <= MAX_IMAGE_SIZE for size in sizes):
        raise _refusal(info, f"img_size={value!r:.60} must be one or two whole numbers up to {MAX_IMAGE_SIZE}")
    return sizes[0], sizes[1]


def _eps(info: Mapping[str, Any], value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e-3:
        raise _refusal(info, f"{NORM_EPS}={value!r:.60} must be a small positive number")
    return value


def _refusal(info: Mapping[str, Any], why: str) -> ConfigError:
    tag = printable(info["pretrained_tag"] or "none", 80)
    return ConfigError(
        f"These prompts were learnt on {printable(info['architecture'], 80)} (tag {tag}), which is not built here: "
        f"{printable(why)}. Give that model, from_pretrained(folder, vit)."
    )
