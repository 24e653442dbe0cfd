"""Description of a transformers model for prompt files: identity, sizes and preprocessing.

A model does not include its image processor. The description has the image size of the config and the usual values of
the family: the defaults of its processor class, or ImageNet's statistics if published checkpoints use them. The
processor of a checkpoint may differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import isqrt
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers.models.auto import image_processing_auto

from lpt_peft.backbones.base import BackboneInfo

# Config keys that determine shapes and meaning of the weights; a prompt file records no others.
MODEL_ARGS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "image_size", "patch_size", "num_channels", "num_patches", "num_frames", "tubelet_size"),
    *("hidden_act", "layer_norm_eps", "rms_norm_eps", "mlp_ratio", "qkv_bias", "use_qk_norm", "num_register_tokens"),
    *("use_swiglu_ffn", "use_gated_mlp", "layerscale_value", "layer_scale_init_value", "rope_theta"),
    *("use_relative_position_bias", "use_shared_relative_position_bias", "use_absolute_position_embeddings"),
    *("use_mean_pooling", "use_head", "vision_use_head"),
)
# Families whose published checkpoints use ImageNet's statistics, unlike the default of their processor class.
_IMAGENET_FAMILIES = frozenset(
    (
        *("deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "internvl_vision", "pixio"),
        *("sapiens2", "videomae", "vit_mae", "vit_msn"),
    )
)
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def info(model: Any, config: Any, depth: int, frozen: Iterable[Tensor]) -> BackboneInfo:
    """Return the description from the configs of the model and of its layers."""
    origin = getattr(model.config, "_name_or_path", "") or ""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None and not Path(origin).exists()
    recorded = {key: getattr(config, key, None) for key in MODEL_ARGS}
    return BackboneInfo(
        library="transformers",
        library_version=transformers.__version__,
        architecture=type(model).__name__,
        hub_id=origin if is_hub_id else None,
        hub_revision=getattr(model.config, "_commit_hash", None) if is_hub_id else None,
        embed_dim=config.hidden_size,
        depth=depth,
        num_heads=config.num_attention_heads,
        num_parameters=sum(tensor.numel() for tensor in frozen),
        model_args={
            key: list(value) if isinstance(value, tuple) else value
            for key, value in sorted(recorded.items())
            if isinstance(value, (bool, int, float, str, list, tuple))
        },
    )


def preprocess(model: Any, config: Any) -> dict[str, Any]:
    """Return the preprocessing without a crop; mean and std 0.5 and bicubic if the family has no processor."""
    processor = next(_processors(model.config.model_type, config.model_type), None)
    channels = getattr(config, "num_channels", 3)
    mean, std = (getattr(processor, name, None) or [0.5] * channels for name in ("image_mean", "image_std"))
    if config.model_type in _IMAGENET_FAMILIES:
        mean, std = _IMAGENET
    elif hasattr(config, "norm_mean"):  # RADIO normalizes in its forward
        mean, std = [0.0] * channels, [1.0] * channels
    size = getattr(config, "image_size", None) or isqrt(config.num_patches) * config.patch_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {
        "input_size": [channels, height, width],
        "mean": list(mean),
        "std": list(std),
        "interpolation": _RESAMPLE.get(getattr(processor, "resample", 3), "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _processors(*model_types: str) -> Iterator[Any]:
    """Image processor classes of these families that can be imported."""
    names: Any = getattr(image_processing_auto, "IMAGE_PROCESSOR_MAPPING_NAMES", {})
    for model_type in model_types:
        for family in (model_type, model_type.removesuffix("_vision_model"), model_type.removesuffix("_model")):
            found = names.get(family) or {}
            for name in found.values() if isinstance(found, dict) else found:  # a tuple in transformers 5.0
                with suppress(AttributeError, ImportError, TypeError):  # torchvision or pillow is not installed
                    yield getattr(transformers, name)
