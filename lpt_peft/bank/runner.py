"""Runs the forward of a bank, eagerly or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.input_errors import explain_failure
from lpt_peft.bank.forward import Mode, bank_forward
from lpt_peft.bank.tables import Tables
from lpt_peft.errors import LPTError


class Runner:
    """Calls `bank_forward` with the slots of a batch.

    Args:
        backbone: The wrapped ViT.
        device: Device of the tables.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self._forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = bank_forward
        self._compiled = False
        self._static: Tables | None = None

    def compile(self, **options: Any) -> None:
        """Compile the forward at its next call; `options` are those of `torch.compile`."""
        self._forward = torch.compile(bank_forward, fullgraph=True, **options)
        self._compiled = True

    def __call__(self, tables: Tables, mode: Mode, images: Any, slots: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, features and groups of a batch; see `bank_forward`."""
        task = torch.tensor(slots).to(self._device)
        if self._compiled and self._static is not tables:
            for table in tables:
                torch._dynamo.mark_static(table)  # a larger table compiles another graph, without dynamic sizes
            self._static = tables
        try:
            return self._forward(self._backbone, tables, mode, images, task)
        except LPTError:
            raise
        except Exception as error:
            if (explained := explain_failure(self._backbone, (images,), {}, error)) is not None:
                raise explained from error
            raise
