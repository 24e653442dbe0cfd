"""One function per library that builds a model by name. Not here: the choice of the library (`loading.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
from torch import nn

from lpt_peft.backbones.listing import Entry, closest, find, open_clip_tower, plain_timm_names, refusal
from lpt_peft.errors import BackboneError, ConfigError, MissingExtraError

ImageSize = int | tuple[int, int] | None

_EXTRAS = {"open_clip": "open-clip", "transformers": "transformers"}
_MAX_TAGS = 12  # in a message
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def build_timm(name: str, *, pretrained: bool, img_size: ImageSize, **model_args: Any) -> nn.Module:
    """`timm.create_model`, without a head unless `num_classes` is given; `name` may end in the tag of its weights."""
    architecture, _, tag = name.partition(".")
    _check_listed("timm", architecture, supported=plain_timm_names())
    if pretrained and "pretrained_cfg_overlay" not in model_args:
        tags = [title.partition(".")[2] for title in timm.list_pretrained(f"{architecture}.*")]
        _check_tag("timm", architecture, tag or next(iter(tags), ""), tags)
    if img_size is not None:
        model_args["img_size"] = img_size
    with _errors_named(f"timm/{name}", pretrained, model_args):
        return timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **model_args})


def build_torchvision(name: str, *, pretrained: bool, img_size: ImageSize, **model_args: Any) -> nn.Module:
    """A model of torchvision; `name` may end in the name of its weights, which is otherwise DEFAULT."""
    from torchvision import models  # noqa: PLC0415 - takes a second to import

    architecture, _, tag = name.partition(".")
    _check_listed("torchvision", architecture)
    tag = tag or "DEFAULT"
    if pretrained:
        _check_tag("torchvision", architecture, tag, list(models.get_model_weights(architecture).__members__))
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != width:
            raise ConfigError(f"img_size={img_size!r}: ViTs of torchvision take square images only; give one number.")
        model_args["image_size"] = height
    with _errors_named(f"torchvision/{name}", pretrained, model_args):
        return models.get_model(architecture, weights=tag if pretrained else None, **model_args)


def build_open_clip(name: str, *, pretrained: bool, img_size: ImageSize, **model_args: Any) -> nn.Module:
    """The visual tower of a model of open_clip; with weights, `name` ends in their tag."""
    _require("open_clip")
    import open_clip  # noqa: PLC0415 - optional

    architecture, _, tag = name.partition(".")
    _check_listed("open_clip", architecture)
    if img_size is not None:
        model_args["force_image_size" if pretrained else "image_size"] = img_size
    if not pretrained:
        with _errors_named(f"open_clip/{name}", pretrained, model_args):
            return open_clip_tower(architecture, **model_args)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    _check_tag("open_clip", architecture, tag, tags)
    with _errors_named(f"open_clip/{name}", pretrained, model_args):
        return open_clip.create_model(architecture, pretrained=tag, **model_args).visual


def build_transformers(name: str, *, pretrained: bool, img_size: ImageSize, **model_args: Any) -> nn.Module:
    """`AutoModel` of a Hub repository or a folder; without weights also of a model type. No code of others runs."""
    _require("transformers")
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - optional

    if img_size is not None:
        model_args["image_size"] = list(img_size) if isinstance(img_size, tuple) else img_size
    if not pretrained and "/" not in name and not Path(name).exists():
        _check_listed("transformers", name)
        with _errors_named(f"transformers/{name}", pretrained, model_args):
            return AutoModel.from_config(AutoConfig.for_model(name, **model_args))
    if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
        raise BackboneError(
            f'"{name}" is neither a folder nor a Hub repository "owner/name", so there are no weights to load. Give '
            "transformers/owner/name, for example transformers/google/vit-base-patch16-224."
        )
    with _errors_named(f"transformers/{name}", pretrained, model_args):
        if pretrained:
            return AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **model_args)
        return AutoModel.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False, **model_args))


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
    "open_clip": build_open_clip,
    "transformers": build_transformers,
}


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise MissingExtraError(
            f'Backbones of {library} need that library: pip install "lpt_peft[{_EXTRAS[library]}]".'
        )


def _check_listed(library: str, name: str, supported: Sequence[str] = ()) -> None:
    """Refuse a name that the library does not list, or a model that cannot take prompts, before any download."""
    if name in supported:
        return
    entry: Entry | None = find(f"{library}/{name}")
    if entry is None:
        near = ", ".join(closest(name, library))
        raise BackboneError(f'{library} has no model "{name}". Similar names: {near}.')
    if (why := refusal(entry)) is not None:
        raise BackboneError(why)


def _check_tag(library: str, architecture: str, tag: str, tags: Sequence[str]) -> None:
    """Refuse weights that the library does not list for this model."""
    if tag in tags:
        return
    if not tags:
        raise BackboneError(
            f"{library} has no pretrained weights for {architecture}. Use another model, give weights_file= "
            "(--backbone-weights, models of timm), or random weights with pretrained=False (--no-pretrained)."
        )
    problem = f'no weights "{tag}" for' if tag else "several pretrained weights for"
    more = ", ..." if len(tags) > _MAX_TAGS else ""
    raise BackboneError(
        f"{library} has {problem} {architecture}. Add the tag of some, for example {library}/{architecture}.{tags[0]}. "
        f"Available: {', '.join(tags[:_MAX_TAGS])}{more}."
    )


@contextmanager
def _errors_named(spec: str, pretrained: bool, model_args: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the library, the network or a damaged file as an LPTError that names the backbone."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:300]}".rstrip(".")
        given = {name: value for name, value in model_args.items() if name != "pretrained_cfg_overlay"}
        if given and isinstance(error, (TypeError, ValueError, AttributeError)):
            raise ConfigError(f"{spec} cannot be built with {given!r:.200}: {why}.") from error
        if not pretrained:
            raise BackboneError(f"{spec} cannot be built: {why}.") from error
        raise BackboneError(
            f"The weights of {spec} cannot be loaded: {why}. Without a network connection give a file of weights, "
            "weights_file= (--backbone-weights, models of timm); for random weights, pretrained=False "
            "(--no-pretrained)."
        ) from error
