"""The benchmark of the losses runs."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmark_runs(capsys):
    runpy.run_path(str(ROOT / "examples/benchmarks/losses.py"))["main"](rows=4, classes=10, rounds=2)
    printed = capsys.readouterr().out
    for name in (
        "cross_entropy",
        "AGCLLoss, train",
        "AGCLLoss, eval",
        "AGCLLoss, soft target",
        "LPTLoss, train",
        "the noise alone",
    ):
        assert name in printed
