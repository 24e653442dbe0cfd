"""Adapters under FSDP and DDP; run by test_adapter_state.py, one kind per call.

`python -m tests.sharded_processes fsdp2 FOLDER` and `ddp` start two gloo processes, `fsdp1` a single process. Rank 0
writes its results to FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import StateError
from tests.conftest import tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 1, 4])


def build(seed: int = 0) -> LongTailPromptAdapter:
    """A small adapter in phase "group", whose prompts depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=3, pool_size=5, head_dropout=0.0)
    adapter.phase = "group"
    return adapter


def gradients(adapter: LongTailPromptAdapter, model: Any) -> dict[str, Tensor]:
    """One training step's gradients, by name."""
    out = model(IMAGES, return_output=True)
    (torch.nn.functional.cross_entropy(out.logits, TARGET) + 1 - out.similarity.mean()).backward()
    names = ("pool.prompts", "pool.keys", "head.weight")
    return {name: adapter.get_parameter(name).grad.clone() for name in names}


def fsdp2() -> dict[str, Any]:
    """Load full tensors into sharded parameters; return them and the logits."""
    adapter, other = build(0), build(1)
    for block in adapter.backbone.blocks:
        fully_shard(block)
    fully_shard(adapter)
    adapter.load_adapter_state_dict(other.adapter_state_dict())
    sharded = all(
        type(adapter.get_parameter(name)).__name__ == "DTensor" for name in adapter.prompt_config.tensor_shapes
    )
    loaded = adapter.adapter_state_dict()
    with torch.no_grad():
        logits = adapter.eval()(IMAGES)
    full = StateDictOptions(full_state_dict=True)
    state = {name: tensor.clone() for name, tensor in get_model_state_dict(adapter, options=full).items()}
    adapter.load_adapter_state_dict(build(2).adapter_state_dict())
    adapter.phase = "shared"
    set_model_state_dict(adapter, state, options=full)
    with torch.no_grad():
        again = adapter(IMAGES)
    return {"tensors": loaded, "logits": logits, "sharded": sharded, "again": again, "phase": adapter.phase}


def fsdp1() -> dict[str, Any]:
    """A training step under FullyShardedDataParallel, and the tensors after it."""
    adapter = build(0).train()
    model = FullyShardedDataParallel(adapter, device_id=torch.device("cpu"), use_orig_params=True)
    found = gradients(adapter, model)
    with FullyShardedDataParallel.summon_full_params(model):
        tensors = adapter.adapter_state_dict()
    return {"gradients": found, "tensors": tensors}


def ddp() -> dict[str, Any]:
    """Cross-entropy on the logits alone under DDP, and wrappers used after a change of phase."""
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found: dict[str, Any] = {}
    for phase in ("shared", "group"):
        adapter = build(0).train()
        adapter.phase = phase
        model = DistributedDataParallel(adapter)
        for _ in range(2):  # DDP reports an unused parameter in the second step
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(IMAGES[half]), TARGET[half]).backward()
        found[phase] = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
        with torch.no_grad():
            model.eval()(IMAGES[half])
        model.train()
        adapter.phase = {"shared": "group", "group": "shared"}[phase]
        found[f"used in {phase}"] = refusal(model, IMAGES[half])
        with torch.no_grad():
            found[f"evaluates after {phase}"] = model.eval()(IMAGES[half]).shape == (2, 7)
        unused = DistributedDataParallel(adapter.train(), find_unused_parameters=True)
        adapter.phase = phase
        found[f"built before {phase}"] = refusal(unused, IMAGES[half])
        new = DistributedDataParallel(adapter)
        found[f"new in {phase}"] = refusal(new, IMAGES[half])
    return found


def refusal(model: Any, images: Tensor) -> str:
    """The message of a refused training step, or an empty text."""
    try:
        model(images).sum().backward()
    except StateError as error:
        return str(error)
    return ""


def work(rank: int, kind: str, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    results = {"ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2}[kind]()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    size = {"ddp": 2, "fsdp1": 1, "fsdp2": 2}[sys.argv[1]]
    torch.multiprocessing.spawn(work, args=(sys.argv[1], sys.argv[2], size), nprocs=size)
