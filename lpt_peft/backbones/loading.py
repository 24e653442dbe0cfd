"""Building pretrained backbones: by name (`build_backbone`), or as a prompt file records them (`build`).

A prompt file may come from anyone, so `build` only selects among the models that the installed libraries list. Whether
the weights are those of the training is checked later, by the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lpt_peft._text import printable
from lpt_peft.backbones.bundled import NAME as BUNDLED
from lpt_peft.backbones.bundled import TAG
from lpt_peft.errors import ConfigError

MAX_IMAGE_SIZE = 2048
NORM_EPS = "norm_eps"
"""Besides timm's own arguments: eps of every LayerNorm, where it differs from the architecture's."""

# Arguments besides img_size and norm_eps that pretrained weights can follow.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "dynamic_img_size": (True, False),
    "dynamic_img_pad": (True, False),
    "global_pool": ("token", "avg", "avgmax", "max"),
}


def build_backbone(
    spec: str,
    *,
    pretrained: bool = True,
    img_size: int | tuple[int, int] | None = None,
    weights_file: str | PathLike[str] | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build a backbone by name, in eval mode. `lpt-peft train --backbone SPEC` calls this function.

    Names are compared with the library's own list before any download.

    Args:
        spec: `glyph_vit`, which this package ships; a name of timm, with or without the tag of its weights
            (`vit_base_patch16_224.augreg_in21k`); or a library and a name in it: `timm/NAME`, `torchvision/vit_b_16`,
            `torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1`, `open_clip/ViT-B-32.openai` (its visual tower),
            `transformers/google/vit-base-patch16-224` (a repository on the Hub, or a folder), and without weights
            also a model type, `transformers/dinov2`.
        pretrained: Load pretrained weights, which are downloaded unless they are cached; False draws them from
            torch's default generator.
        img_size: Pixels of a side, or (height, width); None is the size of the model.
        weights_file: Safetensors file of the weights instead of a download; models of timm only.
        **model_args: Further arguments for the library: `timm.create_model`, torchvision's builder,
            `open_clip.create_model`, or the config of transformers.

    Raises:
        BackboneError: No installed library has this model, or its weights cannot be loaded.
        ConfigError: The model does not take these arguments.
        MissingExtraError: The library is not installed.

    Example:
        >>> vit = build_backbone("timm/vit_tiny_patch16_224", pretrained=False, img_size=32)
        >>> vit.patch_embed.img_size, vit.num_classes
        ((32, 32), 0)
    """
    from lpt_peft.backbones.bundled.glyph_vit import glyph_vit  # noqa: PLC0415 - imports timm
    from lpt_peft.backbones.by_name import BUILDERS  # noqa: PLC0415 - imports timm

    if spec in {BUNDLED, f"lpt_peft/{BUNDLED}"}:
        if not pretrained or img_size is not None or weights_file is not None or model_args:
            raise ConfigError(
                f"{BUNDLED} has fixed weights and takes images of 32 px: give no other weights, image size or model "
                "arguments, or use another backbone."
            )
        return glyph_vit()
    library, _, name = spec.partition("/")
    if library not in BUILDERS:
        library, name = "timm", spec
    sizes = img_size if isinstance(img_size, tuple) else (img_size,)
    if img_size is not None and not (len(sizes) <= 2 and all(type(size) is int and size > 0 for size in sizes)):
        raise ConfigError(f"img_size={img_size!r} must be a positive number of pixels, or two, (height, width).")
    if weights_file is not None:
        if library != "timm":
            raise ConfigError(f"weights_file={str(weights_file)!r} is for models of timm, not of {library}.")
        if not Path(weights_file).is_file():
            raise ConfigError(f"weights_file={str(weights_file)!r} does not exist; give a safetensors file.")
        model_args["pretrained_cfg_overlay"] = {"file": str(weights_file)}
        pretrained = True
    return BUILDERS[library](name, pretrained=pretrained, img_size=img_size, **model_args).eval()


def build(info: Mapping[str, Any]) -> nn.Module:
    """Build the pretrained model that a prompt file names, in eval mode; downloaded unless it is cached.

    Args:
        info: `backbone` of a checked config.json.

    Raises:
        ConfigError: The installed library has no such model or weights, or they do not allow these arguments.
        Exception: Whatever the library raises when the download fails.
    """
    return _plan(info)()


def can_build(info: Mapping[str, Any]) -> bool:
    """Return whether `build` would try; False where it would refuse before any download."""
    try:
        _plan(info)
    except ConfigError:
        return False
    return True


def _plan(info: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Return a function that builds the model."""
    if info["library"] == "timm":
        return _plan_timm(info)
    if info["library"] != "transformers":
        raise _refusal(info, f'models of "{info["library"]:.40}" are not built here')
    if find_spec("transformers") is None:
        raise _refusal(info, 'transformers is not installed (pip install "lpt_peft[transformers]")')
    try:
        loading = import_module("lpt_peft.backbones.transformers.loading")  # an optional extra
    except ImportError as error:  # installed, but not compatible with this huggingface_hub or torch
        raise _refusal(info, f"transformers cannot be imported ({error!s:.120})") from error
    if (why := loading.why_not(info)) is not None:
        raise _refusal(info, why)
    return partial(loading.load, info)


def _plan_timm(info: Mapping[str, Any]) -> Callable[[], nn.Module]:
    import timm  # noqa: PLC0415 - takes a second to import

    from lpt_peft.backbones.bundled.glyph_vit import glyph_config, glyph_vit  # noqa: PLC0415 - imports timm

    architecture, tag = info["architecture"], info["pretrained_tag"]
    if (architecture, tag) == (BUNDLED, TAG):
        if dict(info["model_args"]) != glyph_config()["model_args"]:
            raise _refusal(info, "its sizes are not those of the bundled model")
        return glyph_vit
    if architecture not in timm.list_models():
        raise _refusal(info, f"timm {timm.__version__} has no such architecture")
    if tag is None or f"{architecture}.{tag}" not in timm.list_models(pretrained=True):
        raise _refusal(info, f"timm {timm.__version__} has no pretrained weights of that tag")
    arguments = _arguments(info)
    return lambda: timm.create_model(f"{architecture}.{tag}", pretrained=True, **arguments).eval()


def _arguments(info: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the file that pretrained weights can follow; others are refused."""
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
        raise _refusal(info, f"img_size={value!r:.60} must be one or two integers up to {MAX_IMAGE_SIZE}")
    return sizes[0], sizes[1]


def _eps(info: Mapping[str, Any], value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e-3:
        raise _refusal(info, f"{NORM_EPS}={value!r:.60} must be positive and at most 0.001")
    return value


def _refusal(info: Mapping[str, Any], why: str) -> ConfigError:
    tag = printable(info["pretrained_tag"] or "none", 80)
    return ConfigError(
        f"These prompts were trained on {printable(info['architecture'], 80)} (tag {tag}), which is not built here: "
        f"{printable(why)}. Pass the model: from_pretrained(folder, vit)."
    )
