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
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.checkpoint import USAGE
from lpt_peft.checkpoint.content import ROUTER
from lpt_peft.config import BLOCK_K_MARK, PromptConfig
from lpt_peft.errors import InputError, StateError
from lpt_peft.phase import PhaseMixin
from lpt_peft.router import MAX_SEED, MAX_WIDTH, Router, RouterLayout, router_shapes

_INDEX = "phase_index"


class StateMixin(PhaseMixin):
    """The part of an adapter that saves and loads tensors.

    Attributes:
        backbone_in_state_dict: False leaves the frozen tensors of the ViT out of `state_dict()`, and
            `load_state_dict(strict=True)` does not require them: checkpoints of any trainer then hold prompts only.
            Trainable tensors of the ViT, such as LoRA's, are kept. The backbone is not identified; prompt files
            (`save_pretrained`) do that.
        router: `Router` of `fit_router`, or None; part of state dicts and prompt files. Assign None to remove it.
        trained_parts: Where the values of "shared" (the shared prompt) and "pool" (keys and group prompts) come from,
            if they were loaded from a prompt file or trained by `lpt_peft.recipe`. Training keeps these parts instead
            of initializing them; `trained_parts.clear()` initializes them again.
    """

    vit: nn.Module
    prompt_config: PromptConfig
    backbone_in_state_dict: bool
    router: Router | None
    trained_parts: dict[str, str]
    _route: Any
    _router_mark: str | None  # hash of what the router was fitted to; None: that of the current values

    def _init_state(self) -> None:
        self.backbone_in_state_dict = True
        self.trained_parts = {}
        self._load_prefix = ""
        self._mark_query()
        self.register_module("router", None)
        self._set_router(None)
        self.register_state_dict_post_hook(_leave_backbone_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_allow_missing_backbone)  # type: ignore[no-untyped-call]

    def _set_router(self, router: Router | None) -> None:
        """Set the router of the current prompts and keys; the route is then exact."""
        self.router, self._route, self._router_mark = router, "exact", None
        if router is not None:
            self._router_is_stale()

    def _router_is_stale(self) -> bool:
        """Whether shared prompts or keys have changed since the router was fitted or loaded."""
        current = fingerprint(read_value(*self._owner(name)).float() for name in ("shared.prompts", "pool.keys"))
        self._router_mark = self._router_mark or current
        return self._router_mark != current

    def _drop_router(self, reason: str) -> None:
        """Remove the router, if any, with a warning."""
        if self.router is not None:
            self._set_router(None)
            warnings.warn(f"The router was removed: {reason} Call fit_router again.", UserWarning, stacklevel=4)

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

    def _file_tensors(self) -> tuple[dict[str, Tensor], RouterLayout | None]:
        """Tensors of a prompt file: prompts, keys, head, and usage and router if they are known and fit."""
        tensors = self.adapter_state_dict()
        tensors.pop(BLOCK_K_MARK, None)  # part of the configuration in a file
        if self.pool is not None and bool((self.pool.usage >= 0).all()):
            tensors[USAGE] = self.pool.usage.clone()
        router = self.router if self._phase == "group" else None
        if router is None:
            return tensors, None
        if self._router_is_stale():
            warnings.warn(
                "The router is not written: the shared prompts or keys have changed since it was fitted. Call "
                "fit_router again, or assign adapter.router = None.",
                UserWarning,
                stacklevel=4,
            )
            return tensors, None
        return {**tensors, ROUTER[0]: router.weight, ROUTER[1]: router.bias}, router.layout

    def _load_file_extras(self, tensors: Mapping[str, Tensor], layout: RouterLayout | None) -> None:
        """Set usage and router of a prompt file, whose prompts are loaded already."""
        if self.pool is not None:
            self.pool.load_usage(tensors.get(USAGE))
        if layout is None:
            self._drop_router("the prompts that were loaded have none.")
        else:
            device = self.pool.usage.device
            weight, bias = (tensors[name].to(device, copy=True) for name in ROUTER)
            self._set_router(Router(weight, bias, layout).to(device))

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
        try:
            self._load_router(state_dict, prefix, has_prompts)
        except InputError as error:
            error_msgs.append(str(error))
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

    def _load_router(self, state_dict: Mapping[str, Any], prefix: str, has_prompts: bool) -> None:
        """Make room for the router of a state dict, whose values torch then loads; prompts without one remove it."""
        names = [f"{prefix}router.{name}" for name in ("weight", "bias", "layout_numbers")]
        if not any(name in state_dict for name in names):
            if has_prompts:
                self._drop_router("the state dict has prompts without a router.")
            return
        layout = self._checked_layout(*(state_dict.get(name) for name in names))
        like, route = next(self.shared.parameters()), self._route
        weight, bias = (torch.empty_like(state_dict[name], dtype=like.dtype, device=like.device) for name in names[:2])
        self.router = Router(weight, bias, layout).to(like.device)
        self._route, self._router_mark = route, None

    def _checked_layout(self, weight: Any, bias: Any, numbers: Any) -> RouterLayout:
        """The layout of a router in a state dict, if its tensors fit together and to this adapter."""
        sizes = self.prompt_config
        given = all(isinstance(value, Tensor) for value in (weight, bias, numbers)) and numbers.numel() == 3
        layout = RouterLayout(*(int(number) for number in numbers.flatten().tolist())) if given else RouterLayout()
        limits = ((1, max(1, sizes.first_group_layer)), (0, MAX_WIDTH), (0, MAX_SEED))
        if given and all(low <= number <= high for number, (low, high) in zip(layout, limits, strict=True)):
            columns = weight.shape[-1] if weight.ndim else 0
            shapes = router_shapes(layout, sizes.pool_size, sizes.dim, columns)
            if sizes.has_groups and (tuple(weight.shape), tuple(bias.shape)) == shapes:
                return layout
        raise InputError(
            "The router of the state dict does not fit this adapter, or its weight, bias and layout_numbers do not fit "
            'together. Leave the names that start with "router." out, and call fit_router again.'
        )


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
