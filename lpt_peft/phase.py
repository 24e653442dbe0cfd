"""The phase of an adapter: what it trains, and a small tensor that carries it through state dicts.

Not here: the two passes (`lpt_peft.adapter`) and the loop that trains a phase (`lpt_peft.recipe`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lpt_peft.config import PHASES, Phase
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.prompts import PromptPool, SharedPrompt

_Self = TypeVar("_Self", bound="PhaseMixin")
_DDP_PHASES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""DistributedDataParallel wrapper -> the phase in which it was built."""


class PhaseMixin(nn.Module):
    """The part of an adapter that knows its phase.

    `forward` reads a Python string, so that nothing is read from a device and compilers see a constant. The buffer
    `phase_index` follows it. Where others write that buffer or put another tensor in its place (`load_state_dict`,
    copies that average weights, loaders of accelerate and torch.distributed.checkpoint), the string follows: at
    loading, else before the next use. A compiled forward and one with several processes in train mode do not look:
    they follow at `train()`, `eval()`, `trainable_parameters()` and where `phase` is read.

    Attributes:
        phase_index: Buffer () int64, the position of the phase in `PHASES`.
    """

    shared: SharedPrompt
    pool: PromptPool
    head: CosineClassifier
    phase_index: Tensor
    _seen_index: tuple[Tensor, int | None]  # the buffer and its version when buffer and string last agreed

    def _init_phase(self, device: torch.device) -> None:
        """Begin in phase "shared"; the modules of prompts and head are there already."""
        self.register_buffer("phase_index", torch.zeros((), dtype=torch.int64, device=device))
        self.phase = "shared"

    @property
    def phase(self) -> Phase:
        """What is trained besides the head: the shared prompt ("shared"), or the pool on a frozen shared one ("group").

        Assignment opens what the phase trains, freezes the other prompts and drops their gradients. A head that you
        have frozen stays frozen, unless shared prompt, pool and head are all frozen: then it is opened, too. The
        parameters to train are others, so make a new optimizer, and a new DistributedDataParallel wrapper.
        """
        self._follow_phase_index()
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase not in PHASES:
            raise ConfigError(f'phase={phase!r} must be "shared" or "group".')
        self._phase: Phase = phase
        self._write_phase_index()
        if not any(parameter.requires_grad for parameter in self._learned_parameters()):
            self.head.requires_grad_(True)  # a call that froze everything, PEFT's for example, was not about the head
        self._freeze_by_phase()

    def _freeze_by_phase(self) -> None:
        for module, trained in ((self.shared, self._phase == "shared"), (self.pool, self._phase == "group")):
            module.requires_grad_(trained)
            if not trained:
                for parameter in module.parameters():
                    parameter.grad = None

    def _learned_parameters(self) -> Iterator[nn.Parameter]:
        for module in (self.shared, self.pool, self.head):
            yield from module.parameters()

    def _write_phase_index(self) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be loaded into outside of it
            self.phase_index = torch.full_like(self.phase_index, PHASES.index(self._phase))
        self._mark_phase_index()

    def _mark_phase_index(self) -> None:
        """Note that `phase_index` and the string agree."""
        self._seen_index = self.phase_index, _version(self.phase_index)

    def _follow_phase_index(self) -> None:
        """Take the phase from `phase_index` if that was written or replaced; costs a read on the host only then."""
        if torch.compiler.is_compiling():
            return
        index, (seen, version) = self.phase_index, self._seen_index
        if (index is not seen or _version(index) != version) and _has_value(index):
            self._read_phase_index()

    def _read_phase_index(self) -> None:
        found = int(self.phase_index)
        if not 0 <= found < len(PHASES):
            raise StateError(f"phase_index holds {found}, which is no phase. Assign adapter.phase.")
        self._mark_phase_index()
        if self._phase != PHASES[found]:
            self._phase = PHASES[found]
            # A copy whose parameters are all frozen, such as a moving average, stays so.
            if any(parameter.requires_grad for parameter in self._learned_parameters()):
                self._freeze_by_phase()

    def _check_ddp(self) -> None:
        """Refuse a DistributedDataParallel wrapper that was built in another phase.

        It averages the gradients of the parameters that were trainable when it was built, and of no others.
        """
        module = sys.modules.get("torch.nn.parallel.distributed")
        if torch.compiler.is_compiling() or module is None:
            return
        if not in_process_group():
            return
        wrapper = getattr(module.DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None:
            return
        if wrapper not in _DDP_PHASES:
            trainable = sum(parameter.requires_grad for parameter in wrapper.module.parameters())
            covered = wrapper._get_ddp_logging_data().get("num_parameter_tensors", trainable)
            _DDP_PHASES[wrapper] = self._phase if covered == trainable else "another"
        if _DDP_PHASES[wrapper] != self._phase:
            raise StateError(
                f'This DistributedDataParallel wrapper was built before adapter.phase became "{self._phase}", so the '
                "processes would train different prompts. Make a new wrapper for each phase: "
                "DistributedDataParallel(adapter)."
            )

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Move, cast or allocate anew, as `to()` and `to_empty()` do."""
        self._follow_phase_index()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._write_phase_index()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: the phase as the buffer has it."""
        self._follow_phase_index()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_phase_index()


def in_process_group() -> bool:
    """Whether torch.distributed runs; then DistributedDataParallel may write the buffers in each step of training."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _version(tensor: Tensor) -> int | None:
    """A number that changes when the tensor is written in place; None in inference mode, where none is kept."""
    return None if tensor.is_inference() else tensor._version


def _has_value(tensor: Tensor) -> bool:
    """Whether the tensor can be read: not on the meta device, nor inside torch.func, nor while a graph is traced."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return fake is None or not isinstance(tensor, fake.FakeTensor)
