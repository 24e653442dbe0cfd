"""Runs the batches of a bank, eagerly or compiled: checks of the arguments, features, logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.input_errors import explain_failure
from lpt_peft.bank.forward import Mode, bank_forward, mode_of
from lpt_peft.bank.heads import classify
from lpt_peft.bank.masks import MaskSupport
from lpt_peft.bank.output import BankOutput
from lpt_peft.bank.registry import Leased
from lpt_peft.bank.tables import Tables
from lpt_peft.errors import InputError, LPTError


class Graphs:
    """Compiled copies of `bank_forward`, one for each mode.

    torch allows 8 graphs for a function, so that banks, modes and sizes of batches would soon exceed this limit.
    Threads that need the same new graph wait until the first of them has compiled it.

    Args:
        options: Of `torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._tables: Tables | None = None
        self._forwards: dict[Mode, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, backbone: Backbone, tables: Tables, mode: Mode, images: Any, task: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the compiled `bank_forward`."""
        arguments = (backbone, tables, mode, images, task)
        key = (id(tables), mode, *((tensor.shape, tensor.dtype) for tensor in _tensors_of(images)))
        if (forward := self._compiled.get(key)) is not None:
            return forward(*arguments)
        with self._lock:
            if self._tables is not tables:
                self._forwards, self._compiled, self._tables = {}, {}, tables
                for table in tables:
                    torch._dynamo.mark_static(table)  # the sizes of the tables are not dynamic
            if mode not in self._forwards:
                # torch keeps graphs, and counts them, for each code object.
                copied = FunctionType(bank_forward.__code__.replace(), bank_forward.__globals__)
                self._forwards[mode] = torch.compile(copied, fullgraph=True, **self._options)
            forward = self._forwards[mode]
            answer = forward(*arguments)
            self._compiled[key] = forward
            return answer


class Runner:
    """Calls `bank_forward` and the classifiers for a batch.

    Args:
        backbone: The wrapped ViT.
        device: Device of the tables.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self._masks = MaskSupport(backbone)
        self._graphs: Graphs | None = None

    def compile(self, **options: Any) -> None:
        """Compile the forward at its next call; `options` are those of `torch.compile`."""
        self._graphs = Graphs(options)

    def __call__(self, leased: Leased, images: Any) -> BankOutput:
        """Answer a batch whose tasks are leased.

        Raises:
            InputError: The images do not fit the ViT.
            BackboneError: Prompts have padding, and the ViT cannot exclude it.
        """
        # A graph for the sizes of the tables serves all batches; without a graph, smaller batches are faster.
        graphs = self._graphs
        mode = mode_of(leased.numbers, None if graphs is None else leased.sizes)
        forward = bank_forward if graphs is None else graphs
        task = torch.tensor(leased.slots).to(self._device)
        try:
            if mode.masked:
                self._masks.require(images)
            features, groups = forward(self._backbone, leased.tables, mode, images, task)
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
    tensor = next((tensor for tensor in _tensors_of(images) if tensor.ndim), None)
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


def _tensors_of(images: Any) -> list[Tensor]:
    values = images.values() if isinstance(images, Mapping) else [images]
    return [value for value in values if isinstance(value, Tensor)]
