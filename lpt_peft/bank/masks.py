"""Check of a backbone: whether its attention can exclude padding tokens of prompts."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lpt_peft.backbones.base import Backbone, Stream, execution_device
from lpt_peft.bank.forward import run_block_masked
from lpt_peft.errors import BackboneError, LPTError

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

    def require(self) -> None:
        """Check the backbone, at the first call.

        Raises:
            BackboneError: It cannot exclude padding.
        """
        with self._lock:
            if not self._checked:
                try:
                    check_masks(self._backbone)
                except BackboneError as error:
                    self._error = str(error)
                self._checked = True
        if self._error is not None:
            raise BackboneError(self._error)


@torch.no_grad()
def check_masks(backbone: Backbone) -> None:
    """Compare prompts of 2 tokens with prompts of 3 tokens of which a mask excludes the last, on a random image.

    Raises:
        BackboneError: An attention takes no mask, or does not apply it to prompts.
    """
    name = type(backbone.model).__name__
    cure = (
        "In a bank on this model, all tasks need the same prompt_length and shared_layers, and a batch is either with "
        "prompts or plain. Use a bank for each prompt_length and shared_layers."
    )
    try:
        effect, deviation, rounding = _effect_and_deviation(backbone)
    except LPTError as error:
        raise BackboneError(f"Prompts of unequal length cannot be mixed on this {name}: {error} {cure}") from error
    except Exception as error:  # depends on the model
        raise BackboneError(
            f"Prompts of unequal length cannot be mixed on this {name}, because they cannot be checked on a random "
            f"image: {error!s:.200} {cure}"
        ) from error
    if not deviation <= max(_TOLERANCE * effect, rounding):
        raise BackboneError(
            f"Prompts of unequal length cannot be mixed on this {name}: its attention ignores the mask that excludes "
            f"padding (difference {deviation:.2g}, effect of the padding {effect:.2g}). {cure}"
        )


def _effect_and_deviation(backbone: Backbone) -> tuple[float, float, float]:
    """Norms of feature differences: effect of the third token, difference with the mask, and rounding errors."""
    size = backbone.preprocess()["input_size"]
    reference = next(parameter for parameter in backbone.model.parameters() if parameter.is_floating_point())
    device = execution_device(backbone.model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, *size), generator=generator).to(device, reference.dtype)
    stream = backbone.embed(images)
    prompts = torch.randn((1, 3, backbone.dim), generator=generator).to(stream.tokens)
    prompts = prompts * stream.tokens.std()
    short, masked, full = (
        _feature(backbone, stream, prompt, mask)
        for prompt, mask in (
            (prompts[:, :2], None),
            (prompts, torch.tensor([[True, True, False]], device=device)),
            (prompts, None),
        )
    )
    rounding = 4 * torch.finfo(stream.tokens.dtype).eps * float(short.norm())
    return float((full - short).norm()), float((masked - short).norm()), rounding


def _feature(backbone: Backbone, stream: Stream, prompt: Tensor, mask: Tensor | None) -> Tensor:
    for block in range(len(backbone.blocks)):
        stream = run_block_masked(backbone, stream, block, prompt, mask)
    return backbone.pool(stream).double().cpu()
