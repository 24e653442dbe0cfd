"""ShotMetrics in two processes of torch.distributed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from tests.metrics.oracle import COUNTS, draw, filled


def test_sync_outside_torch_distributed_does_nothing():
    metrics = filled(*draw(30))
    expected = metrics.compute()
    assert metrics.sync() is metrics
    assert metrics.sync().compute() == expected


WORKER = """
import json, sys, torch
import torch.distributed as dist
from lpt_peft.errors import StateError
from lpt_peft.metrics import ShotMetrics

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
metrics = ShotMetrics(data["counts"])
local_rows = torch.arange(len(data["target"])) % 3 == 0  # a third of the images on rank 0, two thirds on rank 1
local_rows = local_rows if rank == 0 else ~local_rows
for rows in local_rows.nonzero().flatten().split(16):
    metrics.update(data["logits"][rows], data["target"][rows])
local = metrics.compute().num_images
synced = metrics.sync().compute().to_dict()
resumed = ShotMetrics(data["counts"])
resumed.load_state_dict(metrics.state_dict())
merged = ShotMetrics(data["counts"]).merge(metrics)
refused = 0
for again in (metrics, resumed, merged):
    try:
        again.sync()
    except StateError as error:
        refused += "reset()" in str(error)
metrics.reset()
if rank == 0:  # rank 1 has no images
    metrics.update(data["logits"][:7], data["target"][:7])
print(json.dumps([local, refused, synced, metrics.sync().compute().to_dict()]))
dist.destroy_process_group()
"""


def test_two_processes_equal_a_single_process(tmp_path):
    logits, target = draw(200, absent=(2, 8))
    torch.save({"logits": logits, "target": target, "counts": torch.tensor(COUNTS)}, tmp_path / "data.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        out = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], out
    expected = filled(logits, target).compute().to_dict()
    few = filled(logits[:7], target[:7]).compute().to_dict()
    answers = [json.loads(text.splitlines()[-1]) for text, _ in out]
    assert answers == [[67, 3, expected, few], [133, 3, expected, few]]
