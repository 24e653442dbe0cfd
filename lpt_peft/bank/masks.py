"""Check of a backbone: whether its attention can exclude padding tokens of prompts."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from lpt_peft.backbones.base import Backbone, Stream, execution_device
from lpt_peft.bank.forward import run_block_masked
from lpt_peft.errors import BackboneError

_TOLERANCE = 0.05  # of the effect that an excluded token would have; a mask that is not applied gives 1


class MaskSupport:
    """Whether a backbone can exclude padding; checked when it is first needed.

    Args:
        backbone: The wrapped ViT.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._lock = threading.Lock()
        self._checked = False
        self._error: str | None = None

    def require(self, images: Any) -> None:
        """Check the backbone on the images of the first batch that needs it.

        Raises:
            BackboneError: It cannot exclude padding.
        """
        with self._lock:
            if not self._checked:
                try:
                    check_masks(self._backbone, images)
                except BackboneError as error:
                    self._error = str(error)
                self._checked = True
        if self._error is not None:
            raise BackboneError(self._error)


@torch.no_grad()
def check_masks(backbone: Backbone, images: Any) -> None:
    """Compare random prompts of 2 tokens with prompts of 3 tokens of which a mask excludes the last.

    Raises:
        BackboneError: An attention takes no mask, or does not apply it to prompts.
    """
    name = type(backbone.model).__name__
    cure = (
        "Use a batch for each prompt_length and shared_layers, without images of the plain model. A compiled bank "
        "needs a bank for each."
    )
    stream = backbone.embed(images)
    device = execution_device(backbone.model)
    prompts = torch.randn((1, 3, backbone.dim), generator=torch.Generator().manual_seed(0)).to(stream.tokens)
    prompts = (prompts * stream.tokens.std()).expand(len(stream.tokens), -1, -1)
    counted = torch.tensor([[True, True, False]], device=device).expand(len(stream.tokens), -1)
    try:
        short, masked, full = (
            _feature(backbone, stream, prompt, mask)
            for prompt, mask in ((prompts[:, :2], None), (prompts, counted), (prompts, None))
        )
    except BackboneError as error:
        raise BackboneError(f"Prompts of unequal length cannot be mixed on this {name}: {error} {cure}") from error
    effect, deviation = float((full - short).norm()), float((masked - short).norm())
    rounding = 4 * torch.finfo(stream.tokens.dtype).eps * float(short.norm())
    if not deviation <= max(_TOLERANCE * effect, rounding):
        raise BackboneError(
            f"Prompts of unequal length cannot be mixed on this {name}: its attention ignores the mask that excludes "
            f"padding (difference {deviation:.2g}, effect of the padding {effect:.2g}). {cure}"
        )


def _feature(backbone: Backbone, stream: Stream, prompt: Tensor, mask: Tensor | None) -> Tensor:
    for block in range(len(backbone.blocks)):
        stream = run_block_masked(backbone, stream, block, prompt, mask)
    return backbone.pool(stream).double().cpu()
