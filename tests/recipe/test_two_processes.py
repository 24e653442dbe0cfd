"""The loop on two real gloo processes: both phases run under DDP and leave the same prompts on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
import torch.distributed as dist
from accelerate import Accelerator
from lpt_peft.recipe import train
from tests.recipe.test_loop import SETTINGS, striped_data, tiny_adapter

accelerator = Accelerator(cpu=True)
dataset, labels = striped_data()
adapter = tiny_adapter()
start = adapter.pool.keys.clone()
train(adapter, dataset, labels, SETTINGS, accelerator=accelerator, progress=False)
ours = torch.cat([tensor.flatten() for tensor in adapter.adapter_state_dict().values()])
theirs = [torch.zeros_like(ours) for _ in range(dist.get_world_size())]
dist.all_gather(theirs, ours)
assert len(theirs) == 2
assert torch.equal(*theirs), "the ranks drifted apart"
assert not torch.equal(adapter.pool.keys, start)
assert all(parameter.grad is None for parameter in adapter.vit.parameters())
dist.destroy_process_group()
"""


def test_ranks_agree(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
