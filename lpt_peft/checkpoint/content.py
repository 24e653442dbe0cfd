"""PromptContent: the content of a prompt file as plain values and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lpt_peft._version import __version__
from lpt_peft.backbones import BackboneInfo
from lpt_peft.config import Phase, PromptConfig, PromptMetadata
from lpt_peft.router import RouterLayout

USAGE = "pool.usage"
"""The optional tensor: how many training images chose each group."""
ROUTER = ("router.weight", "router.bias")
"""The optional tensors of a router."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptContent:
    """Content of a prompt file.

    Attributes:
        config: Sizes of prompts and head.
        phase: Phase in which the adapter was saved.
        tensors: `shared.prompts` (L, n, d), `pool.prompts` (m, L-K, n, d), `pool.keys` (m, d) and `head.weight` (C, d),
            each float32, float16 or bfloat16 and finite; optionally `pool.usage` (m,) int64, and
            `router.weight` (m, F) and `router.bias` (m,). From a file: on the CPU.
        metadata: Class counts, label names, training record.
        backbone: Model that the prompts were trained on.
        preprocess: How images become tensors; the keys are in docs/explanation/prompt-file.md.
        router: How the features of the router are computed, if there is a router.
        fingerprint: `sha256-tensors-v1` of that model's frozen weights.
        library_version: Version of lpt_peft that wrote the file.
    """

    config: PromptConfig
    phase: Phase
    tensors: Mapping[str, Tensor]
    metadata: PromptMetadata
    backbone: BackboneInfo
    preprocess: Mapping[str, Any]
    fingerprint: str
    router: RouterLayout | None = None
    library_version: str = __version__
