"""Comparison of a backbone with the backbone that prompts were trained on."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from lpt_peft._text import printable
from lpt_peft.backbones import Backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.checkpoint.content import PromptContent
from lpt_peft.checkpoint.model_file import ModelContent
from lpt_peft.errors import BackboneMismatchError, ConfigError

CheckBackbone = Literal["error", "warn", "off"]


def check_choice(check_backbone: str) -> None:
    """Check that the value of `check_backbone` is allowed.

    Raises:
        ConfigError: It is not.
    """
    if check_backbone not in ("error", "warn", "off"):
        raise ConfigError(f'check_backbone={check_backbone!r} must be "error", "warn" or "off".')


def check_match(
    content: PromptContent | ModelContent, backbone: Backbone, check_backbone: CheckBackbone, known: str | None = None
) -> None:
    """Compare a backbone with that of the prompts.

    Args:
        content: The prompts, or the head of a linear probe.
        backbone: The backbone to use them on.
        check_backbone: "error" raises, "warn" warns, "off" skips the comparison.
        known: Fingerprint of the backbone, if it was computed before.

    Raises:
        BackboneMismatchError: They differ, and `check_backbone` is "error".
        ConfigError: `check_backbone` has another value.
    """
    check_choice(check_backbone)
    if check_backbone != "off" and (mismatch := _mismatch(content, backbone, known)):
        if check_backbone == "error":
            raise BackboneMismatchError(f'{mismatch} To load them anyway: check_backbone="warn".')
        warnings.warn(mismatch, stacklevel=3)


def _mismatch(content: PromptContent | ModelContent, backbone: Backbone, known: str | None) -> str | None:
    trained = "These prompts were trained" if isinstance(content, PromptContent) else "This head was trained"
    expected = {**asdict(content.backbone), "fingerprint": content.fingerprint}
    found = {**asdict(backbone.info()), "fingerprint": known or fingerprint(backbone.frozen_tensors())}
    eps = expected["model_args"].get(NORM_EPS)
    other_eps = {m.eps for m in backbone.model.modules() if isinstance(m, nn.LayerNorm)} - {eps}
    if eps is not None and other_eps:
        return (
            f"{trained} on {printable(expected['architecture'], 80)} with LayerNorms of eps={eps:g}; "
            f"the ViT given has {max(other_eps):g}. Build it with norm_layer=partial(torch.nn.LayerNorm, eps={eps:g})."
        )
    # The same weights can be split into another number of heads, which the fingerprint does not show.
    if all(found[key] == expected[key] for key in ("fingerprint", "num_heads")):
        return None
    if all(found[key] == expected[key] for key in ("architecture", "embed_dim", "depth", "num_heads")):
        cause = _cause(content, backbone, found["num_parameters"])
    else:
        cause = f"another architecture; build {printable(expected['architecture'], 80)} with the sizes named here."
    return f"{trained} on {_describe(expected)}; the ViT given is {_describe(found)}. Likely cause: {cause}"


def _cause(content: PromptContent | ModelContent, backbone: Backbone, num_parameters: int) -> str:
    """Why the fingerprints of two backbones differ that share architecture, width, depth and heads."""
    subject = "The prompts are" if isinstance(content, PromptContent) else "The head is"
    expected, found = content.preprocess["input_size"], list(backbone.preprocess()["input_size"])
    sizes = f"the same architecture with {num_parameters:,} instead of {content.backbone.num_parameters:,} parameters"
    if num_parameters == content.backbone.num_parameters:
        cause = "the same architecture, other weights: was pretrained=True forgotten, or is another tag needed?"
        dtype = next(backbone.model.parameters()).dtype
        if dtype != torch.float32:
            cause += f" Or was the model cast to {dtype} after the training?"
        return cause
    if found[1:] != expected[1:]:
        argument = {"timm": "img_size", "open_clip": "force_image_size"}.get(backbone.info().library, "image_size")
        return (
            f"{sizes}. {subject} for images of {expected[1]} x {expected[2]} px and this ViT is for "
            f"{found[1]} x {found[2]} px, so their position embeddings differ in size. Build the ViT for "
            f"{expected[1]} x {expected[2]} px ({argument}=)."
        )
    if found[0] != expected[0]:
        return f"{sizes}. {subject} for images of {expected[0]} channels, this ViT is for {found[0]}."
    arguments = printable(dict(content.backbone.model_args), 200)
    return f"{sizes}, so it was built with other arguments, such as the patch size. The file records {arguments}."


def _describe(backbone: dict[str, Any]) -> str:
    return (
        "{architecture} (tag {pretrained_tag}, width {embed_dim}, {depth} blocks, {num_heads} heads, "
        "fingerprint {fingerprint:.12}...)"
    ).format_map({key: printable(value, 80) for key, value in backbone.items()})
