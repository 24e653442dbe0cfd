"""State dicts of an adapter: its own tensors, and the additions to torch's state dict.

Not here: prompt files (`lpt_peft.pretrained`), which also identify the backbone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft._tensors import gather_full, read_value, refusal, write_value
from lpt_peft.config import BLOCK_K_MARK, PromptConfig
from lpt_peft.errors import StateError
from lpt_peft.phase import PhaseMixin

_INDEX = "phase_index"


class StateMixin(PhaseMixin):
    """The part of an adapter that saves and loads tensors.

    Attributes:
        backbone_in_state_dict: False leaves the frozen tensors of the ViT out of `state_dict()`, and
            `load_state_dict(strict=True)` does not require them: checkpoints of any trainer then hold prompts only.
            Trainable tensors of the ViT, such as LoRA's, are kept. The backbone is not identified; prompt files
            (`save_pretrained`) do that.
    """

    vit: nn.Module
    prompt_config: PromptConfig
    backbone_in_state_dict: bool

    def _init_state(self) -> None:
        self.backbone_in_state_dict = True
        self._load_prefix = ""
        self._mark_query()
        self.register_state_dict_post_hook(_leave_backbone_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_allow_missing_backbone)  # type: ignore[no-untyped-call]

    def _mark_query(self) -> None:
        """Add or remove the buffer that marks state dicts of the block-K query; keys of equal width look alike."""
        self._buffers.pop(BLOCK_K_MARK, None)
        if self.prompt_config.query == "block_k":
            mark = torch.ones((), dtype=torch.int64, device=next(self.shared.parameters()).device)
            self.register_buffer(BLOCK_K_MARK, mark)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return copies of prompts, keys and head; under FSDP2 they are gathered, and all processes must call this.

        Returns:
            `shared.prompts` (L, n, d), `pool.prompts` (m, L-K, n, d), `pool.keys` (m, key_dim), `head.weight` (C, d);
            the current values of parametrized or pruned tensors. With `query="block_k"` also the mark `block_k_query`.
        """
        # Copies: FSDP2 frees the buffers of parameters between passes.
        owners = {name: self._owner(name) for name in self.prompt_config.tensor_shapes}
        tensors = {name: gather_full(read_value(*owner).detach()).clone() for name, owner in owners.items()}
        return tensors | ({BLOCK_K_MARK: torch.ones((), dtype=torch.int64)} if BLOCK_K_MARK in self._buffers else {})

    def load_adapter_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors from `adapter_state_dict` into the adapter; after an error nothing was copied.

        Under FSDP2 every process passes the same full tensors (or DTensors) and keeps its own shard.

        Raises:
            InputError: A name, a shape or a value (NaN, infinity) is wrong, or the keys are for the other `query`.
            StateError: A tensor is parametrized or pruned and cannot take its value.
        """
        self.prompt_config.check_tensors(tensors)
        for name in self.prompt_config.tensor_shapes:
            if (why := refusal(*self._owner(name), tensors[name])) is not None:
                raise StateError(f"{name} cannot be loaded: {why}")
        for name in self.prompt_config.tensor_shapes:
            write_value(*self._owner(name), tensors[name])

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a tensor, and the tensor's name in it."""
        owner, _, leaf = name.partition(".")
        return self.get_submodule(owner), leaf

    def _load_from_state_dict(  # noqa: PLR0917 - torch's signature
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's own buffer, then set the phase from it."""
        self._load_prefix = prefix
        has_prompts = any(prefix + name in state_dict for name in self.prompt_config.tensor_shapes)
        if has_prompts and (mismatch := self.prompt_config.query_mismatch(prefix + BLOCK_K_MARK in state_dict)):
            error_msgs.append(mismatch)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _INDEX not in state_dict:
            if prefix + _INDEX in missing_keys:
                missing_keys.remove(prefix + _INDEX)
            if has_prompts:
                warnings.warn(
                    f'The state dict does not contain its phase; the adapter stays in "{self._phase}". '
                    'If the prompts were trained in the other phase, assign adapter.phase = "group" or "shared".',
                    UserWarning,
                    stacklevel=2,
                )
            return
        if self.phase_index.is_meta:
            return
        try:
            self._read_phase_index()
        except StateError as error:
            error_msgs.append(str(error))
            self.phase = self._phase


def _leave_backbone_out(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if not module.backbone_in_state_dict and "vit" in module._modules:
        trainable = _trainable_names(module, prefix)
        for name in [key for key in state_dict if key.startswith(f"{prefix}vit.")]:
            if name not in trainable:
                del state_dict[name]


def _allow_missing_backbone(module: Any, incompatible_keys: Any) -> None:
    if not module.backbone_in_state_dict and "vit" in module._modules:
        vit, trainable = f"{module._load_prefix}vit.", _trainable_names(module, module._load_prefix)
        missing = incompatible_keys.missing_keys
        missing[:] = [name for name in missing if not name.startswith(vit) or name in trainable]


def _trainable_names(module: Any, prefix: str) -> set[str]:
    parameters = module.vit.named_parameters(prefix=f"{prefix}vit", remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.requires_grad}
