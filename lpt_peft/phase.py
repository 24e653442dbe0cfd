"""The phase of an adapter: which parameters are trained, and a buffer that stores it in state dicts.

Not here: the passes (`lpt_peft.passes`) and the training loop (`lpt_peft.recipe`).
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
"""DistributedDataParallel wrapper -> phase in which it was built."""


class PhaseMixin(nn.Module):
    """The phase of an adapter.

    `forward` reads a Python string: nothing is read from a device, and compilers see a constant. The buffer
    `phase_index` holds the same phase. When other code writes or replaces the buffer (`load_state_dict`, averaged
    copies, loaders of accelerate and torch.distributed.checkpoint), the string is updated at loading or before the
    next use. A compiled forward and a training step of several processes do not check the buffer; `train()`, `eval()`,
    `trainable_parameters()` and reading `phase` do.

    Attributes:
        phase_index: Buffer () int64, the position of the phase in `PHASES`.
    """

    shared: SharedPrompt
    pool: PromptPool
    head: CosineClassifier
    phase_index: Tensor
    _seen_index: tuple[Tensor, int | None]  # the buffer and its version when buffer and string last agreed

    def _init_phase(self, device: torch.device) -> None:
        """Start in phase "shared"; prompts and head must exist."""
        self.register_buffer("phase_index", torch.zeros((), dtype=torch.int64, device=device))
        self.phase = "shared"

    @property
    def phase(self) -> Phase:
        """Current phase: "shared" trains the shared prompt, "group" the pool on a frozen shared prompt.

        The classifier is trained in both. Assigning a phase makes its prompts trainable, freezes the others and sets
        their gradients to None. A head that you froze stays frozen, unless shared prompt, pool and head are all frozen.
        Each phase needs a new optimizer and a new DistributedDataParallel wrapper.
        """
        self._follow_phase_index()
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase not in PHASES:
            raise ConfigError(f'phase={phase!r} must be "shared" or "group".')
        if phase == "group" and self.pool is None:
            raise ConfigError('phase="group" needs groups, and placement="shallow" has none: train "shared" alone.')
        self._phase: Phase = phase
        self._write_phase_index()
        if not any(parameter.requires_grad for parameter in self._learned_parameters()):
            self.head.requires_grad_(True)  # everything was frozen at once, by PEFT for example
        self._freeze_by_phase()

    def _freeze_by_phase(self) -> None:
        self.shared.requires_grad_(self._phase == "shared")
        if self.pool is not None:
            self.pool.requires_grad_(self._phase == "group")
        for parameter in self.parameters():  # a gradient left behind would count in every clipped step
            if not parameter.requires_grad:
                parameter.grad = None

    def _learned_modules(self) -> list[nn.Module]:
        modules: list[nn.Module | None] = [self.shared, self.pool, self.head]
        return [module for module in modules if module is not None]

    def _learned_parameters(self) -> Iterator[nn.Parameter]:
        for module in self._learned_modules():
            yield from module.parameters()

    def _write_phase_index(self) -> None:
        with torch.inference_mode(False):  # load_state_dict cannot write to an inference tensor later
            self.phase_index = torch.full_like(self.phase_index, PHASES.index(self._phase))
        self._mark_phase_index()

    def _mark_phase_index(self) -> None:
        """Note that `phase_index` and the string agree."""
        self._seen_index = self.phase_index, _version(self.phase_index)

    def _follow_phase_index(self) -> None:
        """Read the phase from `phase_index` if the buffer was written or replaced; otherwise reads nothing."""
        if torch.compiler.is_compiling():
            return
        index, (seen, version) = self.phase_index, self._seen_index
        if (index is not seen or _version(index) != version) and _has_value(index):
            self._read_phase_index()

    def _read_phase_index(self) -> None:
        found = int(self.phase_index)
        if not 0 <= found < len(PHASES):
            raise StateError(f'phase_index={found} must be 0 ("shared") or 1 ("group"). Assign adapter.phase.')
        if PHASES[found] == "group" and self.pool is None:
            raise StateError(f'phase_index={found} ("group") needs groups, and placement="shallow" has none.')
        self._mark_phase_index()
        if self._phase != PHASES[found]:
            self._phase = PHASES[found]
            # A copy whose parameters are all frozen, such as a moving average, stays frozen.
            if any(parameter.requires_grad for parameter in self._learned_parameters()):
                self._freeze_by_phase()

    def _check_ddp(self) -> None:
        """Refuse a DistributedDataParallel wrapper that was built in another phase.

        It averages only the gradients of parameters that were trainable when it was built.
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
        """Move, cast or reallocate parameters and buffers; `to()` and `to_empty()` call this."""
        self._follow_phase_index()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._write_phase_index()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for deepcopy and pickle, with the phase of the buffer."""
        self._follow_phase_index()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_phase_index()


def in_process_group() -> bool:
    """Whether torch.distributed is initialized; DistributedDataParallel may then write the buffers in every step."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _version(tensor: Tensor) -> int | None:
    """A number that changes when the tensor is written in place; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def _has_value(tensor: Tensor) -> bool:
    """Whether the tensor can be read: not on the meta device, inside torch.func, or while a graph is traced."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return fake is None or not isinstance(tensor, fake.FakeTensor)
