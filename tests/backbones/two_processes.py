"""DDP and FSDP2 on two ranks, for every row of the table: functions that test_compatibility.py runs.

Each rank has half of the batch. Gradients of trained parameters are full tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lpt_peft import LongTailPromptAdapter
from lpt_peft._prompt_content import content_of
from lpt_peft.checkpoint import encode
from tests.backbones.models import PHASES, ROWS, build, images

TARGET = torch.tensor([0, 3, 1, 4])


def objective(model: nn.Module, batch: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and the match term, which trains the keys."""
    out: Any = model(batch, return_output=True)
    match = 1 - out.similarity.mean() if out.similarity.numel() else 0.0
    return nn.functional.cross_entropy(out.logits, target) + match


def gradients(row: str, phase: str, kind: str) -> dict[str, Tensor]:
    """Gradients by name after one backward pass; `kind` is "single", "DDP" or "FSDP2"."""
    adapter = build(row, phase).double().train()
    batch, target = images(4).double(), TARGET
    model: nn.Module = adapter
    if kind != "single":
        half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        batch, target = batch[half], target[half]
    if kind == "DDP":
        model = DistributedDataParallel(adapter)
    elif kind == "FSDP2":
        shard(adapter)
    objective(model, batch, target).backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def gradients_or_error(row: str, phase: str, kind: str) -> dict[str, Tensor] | str:
    """`gradients`, or the message of an error, which must not stop the other rows."""
    try:
        return gradients(row, phase, kind)
    except Exception as error:
        return repr(error)


def shard(adapter: LongTailPromptAdapter) -> None:
    """FSDP2, block by block."""
    for block in adapter.backbone.blocks:
        fully_shard(block)
    # CLIP's logit_scale: fully_shard takes no parameter without a dimension, and the adapter does not use it.
    fully_shard(adapter, ignored_params={parameter for parameter in adapter.parameters() if parameter.ndim == 0})


def saved(row: str, phase: str, kind: str) -> dict[str, Any]:
    """The bytes of a prompt file, and `adapter_state_dict()`, after an evaluation; `kind` as in `gradients`."""
    adapter = build(row, phase).eval()
    if kind == "FSDP2":
        shard(adapter)
    with torch.no_grad():  # without a backward pass FSDP2 leaves the root's parameters in buffers that it frees later
        adapter(images(2))
    best = adapter.adapter_state_dict()
    encoded = encode(content_of(adapter))
    return {"config": encoded.copy, "weights": encoded.weights, "best": best}


def everything() -> dict[tuple[str, ...], Any]:
    """Results of every row on this rank: by row, phase and kind the gradients or an error, by row what was saved."""
    found: dict[tuple[str, ...], Any] = {}
    for row in ROWS:
        for phase in PHASES:
            for kind in ("DDP", "FSDP2"):
                found[row, phase, kind] = gradients_or_error(row, phase, kind)
        found[row,] = saved(row, "group", "FSDP2")
    return found
