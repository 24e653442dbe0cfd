"""Reads the prompt files of a bank and checks them against its backbone and its limits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike
from typing import Any

from lpt_peft._numbers import checked_integer
from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.bank.tables import sizes_of
from lpt_peft.checkpoint import CheckBackbone, PromptContent, check_match, encode
from lpt_peft.checkpoint.match import check_choice
from lpt_peft.errors import BackboneMismatchError, ConfigError
from lpt_peft.hub import read_prompts

Source = str | PathLike[str]
KEYWORDS = {
    "num_classes": "max_classes",
    "prompt_length": "max_prompt_length",
    "pool_size": "max_pool_size",
    "top_k": "max_top_k",
    "group_layers": "max_group_layers",
}
"""Arguments of `PromptBank` that limit a size of a task."""


def check_keywords(limits: Mapping[str, int | None], depth: int) -> None:
    """Check the limits that a caller gives.

    Raises:
        ConfigError: A limit is not an integer of at least 1, or more than all `depth` blocks have groups.
    """
    for name, limit in limits.items():
        if limit is not None:
            checked_integer(KEYWORDS[name], limit, 1, depth if name == "group_layers" else None)


class TaskReader:
    """Reads prompt files for a backbone.

    Args:
        backbone: The wrapped ViT.
        weights: Its weights, for the fingerprint.
        limits: Largest sizes, by the names in `KEYWORDS`; None is no limit.
        check_backbone: What to do about another backbone: see `PromptBank`.

    Raises:
        ConfigError: `check_backbone` has another value.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: FrozenWeights,
        limits: Mapping[str, int | None],
        check_backbone: CheckBackbone,
    ) -> None:
        check_choice(check_backbone)
        self._backbone, self._weights, self._limits, self._check_backbone = backbone, weights, limits, check_backbone

    def read(self, source: Source, **location: Any) -> tuple[str, PromptContent]:
        """Return the digest and the content of a prompt file; arguments are those of `lpt_peft.hub.read_prompts`.

        Raises:
            PromptFileError: The file is refused, or is for another backbone.
            HubError: The Hub did not deliver it.
            ConfigError: It has shallow prompts or is larger than a limit, or an argument is out of range.
        """
        content = read_prompts(source, **location)
        known = None if self._check_backbone == "off" else self._weights.fingerprint()
        check_match(content, self._backbone, self._check_backbone, known)
        check_sizes(content, self._backbone)
        check_limits(content, self._limits)
        return digest_of(content), content


def check_sizes(content: PromptContent, backbone: Backbone) -> None:
    """Check that prompts have the sizes of a backbone, also where other weights are allowed.

    Raises:
        BackboneMismatchError: They have not.
    """
    config = content.config
    found = (backbone.dim, len(backbone.blocks), backbone.feature_dim)
    if (config.dim, config.depth, config.feature_dim) != found:
        raise BackboneMismatchError(
            f"The prompts are for a ViT of width {config.dim}, {config.depth} blocks and feature width "
            f"{config.feature_dim}; this ViT has {found[0]}, {found[1]} and {found[2]}. Use the ViT of their training."
        )


def check_limits(content: PromptContent, limits: Mapping[str, int | None]) -> None:
    """Check a task against the limits of a bank, by the names in `KEYWORDS`.

    Raises:
        ConfigError: It has shallow prompts, or is larger than a limit.
    """
    if not content.config.has_groups:
        raise ConfigError(
            'The prompts have placement="shallow", which a bank cannot mix with prompts in every block. Use '
            "LongTailPromptAdapter.from_pretrained and load_prompts for this task, or train it with deep prompts."
        )
    sizes = sizes_of(content)
    for name, limit in limits.items():
        found = content.config.num_classes if name == "num_classes" else getattr(sizes, name)
        if limit is not None and found > limit:
            raise ConfigError(
                f"The prompts have {name}={found}, and the bank was created with {KEYWORDS[name]}={limit}. Create the "
                f"bank with {KEYWORDS[name]}={found}, or without that limit."
            )


def digest_of(content: PromptContent) -> str:
    """Hash of a prompt file; equal prompts with equal metadata have the same."""
    return hashlib.sha256(encode(content).weights).hexdigest()
