"""Explaining why a wrapped model failed on its input, after the fact: nothing is checked in a forward that works."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.backbones.base import Backbone, not_floating
from lpt_peft.errors import InputError, LPTError, StateError
from lpt_peft.prompting import Prompted, attentions_of


def explain_failure(
    backbone: Backbone,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: Exception,
    *,
    prompted: bool = True,
) -> LPTError | None:
    """Return the error to raise instead of that of torch or the model's library, or None if the input looks right.

    Args:
        backbone: Driver of the model that failed.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        error: The error of the library.
        prompted: Whether the blocks should take prompts.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return None
    reported = f" The library reports: {str(error).strip().partition(chr(10))[0]:.200}"
    if prompted and (reason := _changed_block(backbone)) is not None:
        return StateError(f"{reason} Replace blocks before wrap(), or unwrap() and wrap the model again.{reported}")
    model = type(backbone.model).__name__
    if torch.is_grad_enabled() and any(parameter.is_inference() for parameter in backbone.model.parameters()):
        return StateError(
            f"Weights of {model} were created in torch.inference_mode(), so no gradient passes them. Build and load "
            f"the model outside of it.{reported}"
        )
    if (reason := _wrong_arguments(backbone, args, kwargs, error)) is not None:
        return InputError(reason)
    given = [*args, *kwargs.values()]
    images = next((value for value in given if isinstance(value, (Tensor, Mapping))), given[0] if given else None)
    if isinstance(images, Mapping) and "patches" not in images:
        cure = "call adapter(**batch)" if "pixel_values" in images else "pass the tensor of images in it"
        return InputError(
            f"Images are a {type(images).__name__} with the keys {', '.join(map(str, images)):.100}, and {model} needs "
            f"a tensor (B, C, H, W): {cure}.{reported}"
        )
    if isinstance(images, Mapping):  # patches of NaFlexViT
        images = next((value for value in images.values() if isinstance(value, Tensor)), None)
        reasons = [] if images is None else [*_dtype_and_device(backbone, images)]
    elif isinstance(images, Tensor):
        reasons = [*_dtype_and_device(backbone, images)]
        if sum(isinstance(value, Tensor) for value in given) == 1:  # with masks or positions, images may be patches
            reasons += _shape(backbone, images)
    elif images is None:
        reasons = [f"{model} needs images: call adapter(images) with a tensor (B, C, H, W)."]
    else:
        reasons = [
            f"Images are a {type(images).__name__}, and {model} needs a tensor (B, C, H, W). Transform and stack them: "
            "torch.stack([transform(image) for image in images])."
        ]
    return InputError(f"{reasons[0]}{reported}") if reasons else None


def _wrong_arguments(
    backbone: Backbone, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> str | None:
    if not isinstance(error, TypeError) or not (args or kwargs):
        return None
    mismatch = _mismatch(backbone.embed, args, kwargs) or _mismatch(backbone.model.forward, args, kwargs)
    if mismatch is None:
        return None
    return (
        f"The forward of {type(backbone.model).__name__} {mismatch}. Call the adapter with arguments of that forward."
    )


def _mismatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _changed_block(backbone: Backbone) -> str | None:
    for index, block in enumerate(backbone.blocks):
        if not any(isinstance(part, Prompted) for part in block.modules()):
            return f"Block {index}, a {type(block).__name__}, takes no prompts: it was replaced after wrap()."
        if isinstance(block, Prompted) and block.sites:
            found = [part for part in attentions_of(block) if any(isinstance(p, Prompted) for p in part.modules())]
            if len(found) != block.sites:
                return f"The attention of block {index}, a {type(block).original.__name__}, was replaced after wrap()."
    return None


def _dtype_and_device(backbone: Backbone, images: Tensor) -> Iterator[str]:
    weight = next((p for p in backbone.model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    given = f"Images are {_name(images)}"
    if weight.is_meta and not images.is_meta:
        yield (
            f"{given} on {images.device}, and the model has no weights yet: they are on the meta device. Load them "
            "first, for example adapter.to_empty(device=...) and load_state_dict."
        )
    elif images.device != weight.device:
        yield f"{given} on {images.device}, the model is on {weight.device}. Move them: images.to(adapter.device)."
    if not images.is_floating_point():
        yield not_floating(images)
    elif images.dtype != weight.dtype:
        yield (
            f"{given}, the model is {_name(weight)}. Convert them, images.to(adapter.dtype), or run the forward under "
            "torch.autocast."
        )


def _shape(backbone: Backbone, images: Tensor) -> Iterator[str]:
    if hasattr(getattr(backbone.model, "config", None), "num_frames"):
        return  # videos
    try:
        channels, height, width = backbone.preprocess()["input_size"]
    except (AttributeError, TypeError, ValueError):  # the model does not describe its images
        return
    shape = tuple(images.shape)
    expected = f"{type(backbone.model).__name__} takes (B, {channels}, {height}, {width})"
    if images.ndim != 4:
        hint = " Add the batch dimension: images.unsqueeze(0)." if images.ndim == 3 else ""
        yield f"Images have shape {shape}; {expected}.{hint}"
    elif shape[0] == 0:
        yield f"Images have shape {shape}: the batch is empty. Skip empty batches."
    elif shape[1] != channels:
        last = " They seem to have channels last: images.permute(0, 3, 1, 2)." if shape[3] == channels else ""
        grey = " Repeat the grey channel: images.expand(-1, 3, -1, -1)." if shape[1] == 1 else ""
        yield f"Images have {shape[1]} channels, shape {shape}; {expected}.{last or grey}"
    elif shape[2:] != (height, width):
        yield (
            f"Images are {shape[2]} x {shape[3]} px; {expected}. Resize them, or build the model for another size "
            f"({_size_argument(backbone)})."
        )


def _size_argument(backbone: Backbone) -> str:
    return {
        "timm": "timm.create_model(..., img_size=...), or dynamic_img_size=True",
        "transformers": "image_size in its config, or call with interpolate_pos_encoding=True",
        "torchvision": "image_size=...",
        "open_clip": "force_image_size=...",
    }.get(backbone.info().library, "see its documentation")


def _name(tensor: Tensor | nn.Parameter) -> str:
    return str(tensor.dtype).removeprefix("torch.")
