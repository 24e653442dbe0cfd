"""Fingerprint of a ViT's frozen weights, cached, and their cast to another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.fingerprint import fingerprint, versions
from lpt_peft.errors import ConfigError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAST_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class FrozenWeights:
    """Caches the fingerprint of a ViT's weights, which a cast does not change.

    Args:
        backbone: Driver of the ViT.

    Example:
        >>> import timm
        >>> from lpt_peft import LongTailPromptAdapter
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=5)
        >>> before = adapter.fingerprint
        >>> adapter.cast_backbone(torch.bfloat16)
        >>> vit.norm.weight.dtype, adapter(torch.randn(2, 3, 32, 32)).dtype, adapter.fingerprint == before
        (torch.bfloat16, torch.float32, True)
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._known: tuple[Any, str] | None = None
        self._cast: tuple[str, str] | None = None  # fingerprints of the cast weights and of those before

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights before `cast`; computed again when a tensor has changed."""
        seen = versions(list(self._backbone.frozen_tensors()))
        if self._known is None or seen is None or self._known[0] != seen:
            self._known = seen, self.compute_fingerprint()
        return self._known[1]

    def compute_fingerprint(self) -> str:
        """Compute the fingerprint without the cache, which does not detect changes through `.data`."""
        found = fingerprint(self._backbone.frozen_tensors())
        return self._cast[1] if self._cast is not None and self._cast[0] == found else found

    @torch.no_grad()
    def cast(self, dtype: torch.dtype, *, trainable: bool = False) -> None:
        """Cast parameters and buffers in place; trainable parameters such as LoRA's keep their dtype by default.

        Args:
            dtype: torch.float32, torch.bfloat16 or torch.float16.
            trainable: Cast trainable parameters as well, for inference.

        Raises:
            ConfigError: Another dtype is given.
        """
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} must be torch.float32, torch.bfloat16 or torch.float16.")
        original = self.compute_fingerprint()
        for module in self._backbone.model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and (trainable or not parameter.requires_grad):
                    parameter.data = parameter.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))
        self._cast, self._known = (fingerprint(self._backbone.frozen_tensors()), original), None

    def cast_inputs(self, arguments: Any) -> Any:
        """Cast floating point tensors in the (nested) arguments of a forward, if the weights were cast."""
        if self._cast is None:
            return arguments
        weights = [p for p in self._backbone.model.parameters() if p.is_floating_point()]
        frozen = (parameter for parameter in weights if not parameter.requires_grad)
        dtype = next(frozen, weights[0]).dtype  # the current dtype: `adapter.float()` may have been called since
        return tree_map_only(
            Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, arguments
        )


def cast_dtype(model: nn.Module) -> str | None:
    """Name of the dtype of a model's weights if they are 16-bit; None otherwise."""
    return _CAST_DTYPES.get(next(model.parameters()).dtype)
