"""Runs the batches of a bank, eagerly or compiled: checks of the arguments, features, logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.input_errors import explain_failure
from lpt_peft.bank.forward import bank_forward, mode_of
from lpt_peft.bank.heads import classify
from lpt_peft.bank.masks import MaskSupport
from lpt_peft.bank.output import BankOutput
from lpt_peft.bank.registry import Leased
from lpt_peft.bank.tables import Tables
from lpt_peft.errors import InputError, LPTError


class Runner:
    """Calls `bank_forward` and the classifiers for a batch.

    Args:
        backbone: The wrapped ViT.
        device: Device of the tables.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self._masks = MaskSupport(backbone)
        self._forward: Callable[..., tuple[Tensor, Tensor]] = bank_forward
        self._compiled = False
        self._static: Tables | None = None

    def compile(self, **options: Any) -> None:
        """Compile the forward at its next call; `options` are those of `torch.compile`."""
        self._forward = torch.compile(bank_forward, fullgraph=True, **options)
        self._compiled = True

    def __call__(self, leased: Leased, images: Any) -> BankOutput:
        """Answer a batch whose tasks are leased.

        Raises:
            InputError: The images do not fit the ViT.
            BackboneError: Prompts have padding, and the ViT cannot exclude it.
        """
        # A graph for the sizes of the tables serves all batches; without a graph, smaller batches are faster.
        mode = mode_of(leased.numbers, leased.sizes if self._compiled else None)
        task = torch.tensor(leased.slots).to(self._device)
        if self._compiled and self._static is not leased.tables:
            for table in leased.tables:
                torch._dynamo.mark_static(table)  # a larger table compiles another graph, without dynamic sizes
            self._static = leased.tables
        try:
            if mode.masked:
                self._masks.require(images)
            features, groups = self._forward(self._backbone, leased.tables, mode, images, task)
        except LPTError:
            raise
        except Exception as error:
            if (explained := explain_failure(self._backbone, (images,), {}, error)) is not None:
                raise explained from error
            raise
        return BankOutput(classify(features, leased.slots, leased.heads), features, groups, leased.facts)


def tasks_of(images: Any, tasks: Any) -> list[str | None]:
    """Task of each image, after checks of their number and types.

    Raises:
        InputError: There is no task for each image, or a task is not a name.
    """
    values = images.values() if isinstance(images, Mapping) else [images]
    tensor = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if tensor is None:
        raise InputError(f"images must be a tensor (B, 3, H, W), not {type(images).__name__}.")
    rows = tensor.shape[0]
    if isinstance(tasks, str) or tasks is None:
        tasks = [tasks] * rows
    names = list(tasks)
    if len(names) != rows:
        raise InputError(f"tasks has {len(names)} names and the batch {rows} images: give a task for each image.")
    if not names:
        raise InputError("The batch has no images: give at least 1.")
    if wrong := [name for name in names if name is not None and not isinstance(name, str)]:
        raise InputError(f"tasks must be names of tasks or None for the plain model, not {wrong[0]!r:.80}.")
    return names
