"""The benchmark of the samplers runs."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmark_runs(capsys):
    module = runpy.run_path(str(ROOT / "examples/benchmarks/samplers.py"))
    labels = module["long_tailed_labels"](500, 20)
    assert (len(labels), set(labels)) == (500, set(range(20)))
    module["main"](num_images=500, num_classes=20, num_draws=2000)
    assert capsys.readouterr().out.count("DualSampler") == 2
