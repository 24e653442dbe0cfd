"""Random weights and the oracle for tests of torchvision's and open_clip's ViTs.

A model is given as its blocks and a function from images to the feature, both of its library; prompts are added by
token concatenation (`tests/oracle.py`). It does not use lpt_peft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle import concatenated_prompts, lpt_by_concatenation

Feature = Callable[[Tensor], Tensor]


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    """The model in eval mode with all parameters (zeros and ones too) changed, so that each has an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_prompts(dim: int, *, batch: int | None, depth: int = 2, seed: int = 0) -> list[Tensor]:
    """Four prompt tokens per block, (4, d) or (batch, 4, d)."""
    shape = (4, dim) if batch is None else (batch, 4, dim)
    return [noise(*shape, seed=seed + layer).requires_grad_() for layer in range(depth)]


def with_prompts(blocks: Sequence[nn.Module], feature: Feature, images: Tensor, prompts: Sequence[Tensor]) -> Any:
    """The feature and the gradients of its prompts."""
    with concatenated_prompts(blocks, prompts):
        out = feature(images)
    return out, torch.autograd.grad((out**2).sum(), prompts)


def lpt(adapter: Any, blocks: Sequence[nn.Module], feature: Feature, images: Tensor) -> dict[str, Tensor]:
    """The method with the adapter's parameters, and the gradients in phase "group"."""
    vit: Any = SimpleNamespace(blocks=blocks, forward_features=lambda x: x, forward_head=lambda x, **_: feature(x))
    trained = {name: tensor.clone().requires_grad_() for name, tensor in adapter.adapter_state_dict().items()}
    shared, groups, keys, weight = trained.values()
    out = lpt_by_concatenation(vit, images, shared, groups, keys, weight, adapter.prompt_config.top_k, 20.0)
    gradients = torch.autograd.grad((out["logits"] ** 2).sum(), [groups, weight])
    return {**out, "pool.prompts": gradients[0], "head.weight": gradients[1]}


def assert_adapter_is_lpt(adapter: Any, blocks: Sequence[nn.Module], feature: Feature, images: Tensor) -> None:
    """Both phases, forward and gradients, to 1e-12 in float64; random prompts, so that groups differ."""
    with torch.no_grad():
        for seed, parameter in enumerate((adapter.shared.prompts, adapter.pool.prompts, adapter.pool.keys)):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    adapter.head_drop.p = 0.0
    adapter.phase = "shared"
    out = adapter(images, return_output=True)
    (gradient,) = torch.autograd.grad((out.features**2).sum(), [adapter.shared.prompts])
    prompts = list(adapter.shared.prompts.detach().clone().requires_grad_())
    expected, expected_gradients = with_prompts(blocks, feature, images, prompts)
    torch.testing.assert_close(out.features, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.stack(expected_gradients), rtol=1e-11, atol=1e-11)

    adapter.phase = "group"
    out = adapter(images, return_output=True)
    expected = lpt(adapter, blocks, feature, images)
    for name in ("logits", "features", "query", "similarity"):
        torch.testing.assert_close(getattr(out, name), expected[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(out.groups, expected["groups"])
    names = ("pool.prompts", "head.weight")
    gradients = torch.autograd.grad((out.logits**2).sum(), [adapter.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11)
