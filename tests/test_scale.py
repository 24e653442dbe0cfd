"""The benchmarks of scale: the bank's capacity, and memory and costs of many images. No test asserts a time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm

from tests.test_benchmarks import script  # noqa: F401 - a fixture

DOCS = Path(__file__).parents[1] / "docs" / "explanation" / "scale.md"
CPU = {
    "read": 4.27,
    "plain ViT": 101.69,
    "phase shared": 102.64,
    "phase group, query final": 154.60,
    "phase group, query block_k": 103.08,
}


def test_bank_capacity_at_tiny_size(script, tmp_path, capsys):  # noqa: F811
    capacity = script("bank_capacity")
    settings = capacity.Settings(model="test_vit", tasks=60, batch_size=8, batches=200, rounds=2, num_classes=5)
    settings.capacities, settings.figure = (8, 20, 60), tmp_path / "figure.png"
    report = capacity.main(settings)
    assert report["differences"] == 0
    for points in report["curves"].values():
        rates = [point["hit_rate"] for point in points]
        assert rates == sorted(rates)
        assert rates[-1] == pytest.approx(points[-1]["pinned"]) == pytest.approx(1)
        assert points[-1]["swaps"] == 0
    assert all(value > 0 for value in report["ms"].values())
    assert settings.figure.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^\| \d", capsys.readouterr().out, re.MULTILINE)) == 3


def test_another_policy_than_that_of_the_bank_is_noticed(script):  # noqa: F811
    capacity = script("bank_capacity")
    vit = timm.create_model("test_vit", num_classes=0).eval()
    content = capacity.random_content(capacity.BankSettings(num_classes=2), vit)
    requests = capacity.zipf_requests(40, 1.0, 60, 4).tolist()

    class MostRecentFirst(capacity.Slots):
        def request(self, batch):
            self.tasks = OrderedDict(reversed(self.tasks.items()))
            return super().request(batch)

    def different(policy):
        return capacity.disagreements(*capacity.make_registry(content, 10, 40), policy(10, 40), requests)

    assert different(capacity.Slots) == 0
    assert different(MostRecentFirst) > 10


def test_zipf_requests_have_the_stated_frequencies(script):  # noqa: F811
    capacity = script("bank_capacity")
    counts = Counter(capacity.zipf_requests(5, 1.2, 4000, 25).ravel().tolist())
    expected = np.array([1, 2**-1.2, 3**-1.2, 4**-1.2, 5**-1.2])
    assert np.allclose([counts[task] / 100_000 for task in range(5)], expected / expected.sum(), atol=0.006)


def test_memory_of_labels_and_paths(script):  # noqa: F811
    folder = Path(script("scale").__file__).parent

    def measured(name, count):
        """In a new process: this process may have free memory, which the object would take."""
        program = (
            f"import queue, sys; sys.path.insert(0, {str(folder)!r}); import scale; results = queue.Queue(); "
            f"scale.measure({name!r}, scale.Settings(num_images={count}), results); print(*results.get()[:3])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        kept, _, copied = map(float, done.stdout.split())
        return kept / count, copied / count

    kept, copied = measured("labels: array of int64", 4_000_000)
    assert kept == pytest.approx(8, abs=1)
    assert copied < 1
    kept, copied = measured("labels: list of int", 1_000_000)
    assert kept > 30, "a pointer and an object of 28 bytes"
    assert copied > 25


def test_cpu_times_and_costs(script, capsys):  # noqa: F811
    scale = script("scale")
    scale.main(scale.Settings(memory=False, model="test_vit", img_size=32, batch_size=2, pixels=40, rounds=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:6] == list(CPU)
    assert sum(line.startswith("| H200, ViT-B") for line in lines) == 9
    assert all(float(line.split("|")[2]) > 0 for line in lines if line.startswith(("| read", "| phase", "| plain")))


def test_costs_of_the_documentation_follow_from_the_measured_times(script):  # noqa: F811
    scale = script("scale")
    row = scale.cost_rows(scale.Settings(gpu_price=3.6, core_price=0), CPU)[1]
    rate = 128 / (12.11e-3 * 1.14)
    cells = [f"{rate:,.0f}", f"{1000 / rate:.2f}", f"{rate * 4.27e-3:.0f}", "0.00"]
    assert row == f"| H200, ViT-B, bf16 weights, phase shared | {' | '.join(cells)} |"
    page = DOCS.read_text(encoding="utf-8")
    assert all(row in page for row in scale.cost_rows(scale.Settings(), CPU))
