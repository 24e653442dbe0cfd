"""Samplers in two processes of torch.distributed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from lpt_peft.samplers import ClassBalancedSampler, DualSampler
from tests.samplers.draws import LONG_TAIL, halves

ROOT = Path(__file__).parents[2]


WORKER = """
import json, sys, torch.distributed as dist
from lpt_peft.losses import AGCLLoss, LPTLoss
from lpt_peft.samplers import ClassBalancedSampler, DualSampler
rank, store, labels = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
early, single = DualSampler(labels, 8, samples_per_class=2), ClassBalancedSampler(labels, 40, samples_per_class=2)
before = [len(early), len(single), early.state_dict()["num_replicas"], repr(early)]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
late = DualSampler(labels, 8, samples_per_class=2)
for dual in (early, late):
    dual.set_epoch(5)
assert list(early) == list(late)
after = [len(early), len(single), early.state_dict()["num_replicas"], repr(early)]
fixed = DualSampler(labels, 8, num_replicas=4, rank=3)
assert fixed.state_dict()["num_replicas"] == 4
print(json.dumps([list(early), list(single), before, after]))
dist.destroy_process_group()
"""


def test_two_processes_share_the_draw(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), json.dumps(LONG_TAIL)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    (dual0, single0, before0, after0), (dual1, single1, before1, after1) = map(json.loads, outputs)
    assert before0 == before1
    assert before0[:3] == [len(LONG_TAIL) // 4 + 1, 40, 1]
    assert after0[:3] == after1[:3] == [len(LONG_TAIL) // 8 + 1, 20, 2]
    assert before0[3].endswith("num_replicas=1, rank=0)")
    assert after1[3].endswith("num_replicas=2, rank=1)")
    instance0, instance1 = (halves(batches)[0][: len(LONG_TAIL) // 8 * 4] for batches in (dual0, dual1))
    assert len(set(instance0) | set(instance1)) == len(instance0) + len(instance1) == len(LONG_TAIL) // 8 * 8

    complete = DualSampler(LONG_TAIL, 16, samples_per_class=2)
    complete.set_epoch(5)
    assert [a[:4] + b[:4] + a[4:] + b[4:] for a, b in zip(dual0, dual1, strict=True)] == list(complete)
    rounds = np.stack([np.reshape(single0, (-1, 2)), np.reshape(single1, (-1, 2))], 1).ravel().tolist()
    assert rounds == list(ClassBalancedSampler(LONG_TAIL, 40, samples_per_class=2))
