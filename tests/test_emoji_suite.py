"""examples/benchmarks/emoji_lt: packing, rows, and the suite on a tiny data set."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lpt_peft.cli.common.rows import Rows, read_rows

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks" / "emoji_lt"
DEFAULTS = """
[defaults]
backbone = "glyph_vit"
batch_size = 8
samples_per_class = 1
num_workers = 0
prompt_length = 2
pool_size = 2
top_k = 1
query = "block_k"
phases = "decoupled"
optimizer = "sgd"
init_prompts = "random"
init_groups = "shared"
shared = { epochs = 1, learning_rate = 0.1 }
group = { epochs = 0, learning_rate = 0.1 }
"""
TUNE = """
[rows."phase1_random.slow"]
init_prompts = "random"
shared = { epochs = 1, learning_rate = 0.001 }
[rows."phase1_random.diverges"]
init_prompts = "random"
shared = { epochs = 1, learning_rate = 1e30 }
[rows."probe_ce.sgd"]
method = "linear_probe"
sampling = "instance"
loss = "cross_entropy"
shared = { epochs = 1, learning_rate = 2.0 }
"""
ROWS = """
[rows.lpt]
shared.epochs = 1
group.epochs = 1
[rows.probe]
method = "linear_probe"
sampling = "instance"
loss = "cross_entropy"
"""
ABLATIONS = """
[rows.fails]
img_size = 48
"""
COUNTS = {"a": 8, "b": 4, "c": 2}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for split, share in (("train", 1), ("validation", 2), ("test", 2), ("shift", 2)):
        for number, (name, count) in enumerate(COUNTS.items()):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count // share):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                pixels[..., number] //= 4
                Image.fromarray(pixels).save(folder / f"{index}.png")
    for name, rows in (("tune", TUNE), ("rows", ROWS), ("ablations", ABLATIONS)):
        (tmp_path / f"{name}.toml").write_text(DEFAULTS + rows)
    return tmp_path / "data"


def test_packed_tensors_are_close(module):
    pack = module("pack")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(5, 40, generator=generator) * torch.tensor([[1e-6], [1.0], [0.0], [3.0], [2000.0]]),
        "bias": torch.randn(7, generator=generator),
    }
    packed = pack.quantize(tensors)
    assert packed["weight"].dtype == torch.int8
    found = pack.dequantize(packed)
    assert set(found) == set(tensors)
    torch.testing.assert_close(found["bias"], tensors["bias"], rtol=1e-3, atol=0)
    largest = tensors["weight"].abs().amax(1, keepdim=True)
    step = largest / 127 + 2**-24  # a float16 cannot be smaller
    assert ((found["weight"] - tensors["weight"]).abs() <= 0.51 * step + 1e-3 * largest).all()


def test_unpacks_the_files_that_were_packed(module, data, tmp_path):
    pack = module("pack")
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "vit.safetensors")
    pack.main(["pack", str(data), str(tmp_path / "vit.safetensors"), str(tmp_path / "packed")])
    pack.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "out")])
    original = {path.relative_to(data): path.read_bytes() for path in data.rglob("*.png")}
    copies = (tmp_path / "out" / "emoji_lt").rglob("*.png")
    assert {path.relative_to(tmp_path / "out" / "emoji_lt"): path.read_bytes() for path in copies} == original
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "vit.safetensors")["weight"], torch.ones(2, 3), rtol=1e-3, atol=0
    )


def test_rows_take_the_settings_that_won(module):
    plan = module("_plan")
    tune_rows = {
        "phase1_random.a": {"init_prompts": "random", "shared": {"epochs": 6, "learning_rate": 1}},
        "phase1_tokens.a": {"init_prompts": "tokens", "shared": {"epochs": 6, "learning_rate": 2}},
        "phase1_tokens.b": {
            "init_prompts": "tokens",
            "optimizer": "adamw",
            "shared": {"epochs": 6, "learning_rate": 3},
        },
        "full.a": {"optimizer": "adamw", "shared": {"epochs": 6, "learning_rate": 4, "head_learning_rate": 5}},
    }
    scores = {"phase1_random.a": 0.3, "phase1_tokens.a": 0.2, "phase1_tokens.b": 0.4, "full.a": 0.1}
    rows = {
        "lpt": {
            "init_prompts": "tokens",
            "shared": {"epochs": 10, "learning_rate": 9},
            "group": {"epochs": 6},
        },
        "random": {"init_prompts": "random", "shared": {"epochs": 16}, "group": {"epochs": 0}},
        "full": {"method": "full", "shared": {"epochs": 16}, "group": {"epochs": 0}},
        "probe": {"method": "linear_probe", "shared": {"epochs": 16, "learning_rate": 7}},
    }
    tune = Rows(source="tune", rows=tune_rows, defaults={"shared": {"weight_decay": 0.5}})
    found = plan.tuned(Rows(source="rows", rows=rows), tune, scores).rows
    phase = {"learning_rate": 3, "head_learning_rate": "None", "weight_decay": 0.5}
    assert found["lpt"] == {
        "init_prompts": "tokens",
        "optimizer": "adamw",
        "shared": {"epochs": 10, **phase},
        "group": {"epochs": 6, **phase},
    }
    assert (found["random"]["init_prompts"], found["random"]["shared"]["learning_rate"]) == ("random", 1)
    assert found["full"]["shared"] == {"epochs": 16, "learning_rate": 4, "head_learning_rate": 5, "weight_decay": 0.5}
    assert found["probe"] == rows["probe"]  # nothing was tuned for it


def test_the_rate_of_the_groups_keeps_its_ratio_to_the_learning_rate(module):
    plan = module("_plan")
    tune = Rows(source="tune", rows={"phase1_random.a": {"shared": {"learning_rate": 3}}})
    row = {"init_prompts": "random", "group": {"epochs": 6, "learning_rate": 0.1, "pool_learning_rate": 2}}
    group = plan.tuned(Rows(source="rows", rows={"lpt": row}), tune, {"phase1_random.a": 0.3}).rows["lpt"]["group"]
    assert (group["learning_rate"], group["pool_learning_rate"]) == (3, pytest.approx(60))


@pytest.mark.parametrize("name", ["tune", "rows", "ablations"])
def test_rows_are_valid_and_have_a_tuned_family(module, name, tmp_path):
    plan = module("_plan")
    tune = read_rows(str(FOLDER / "tune.toml"))
    families = {row.partition(".")[0] for row in tune.rows}
    rows = read_rows(str(FOLDER / f"{name}.toml"))
    for row in rows.rows.values():
        assert plan.family_of({**rows.defaults, **row}) in families
    chosen = plan.tuned(rows, tune, dict.fromkeys(tune.rows, 0.5))
    (tmp_path / "rows.toml").write_text(plan.to_toml(chosen))
    again = read_rows(str(tmp_path / "rows.toml"))
    assert (again.rows, again.defaults, again.baseline) == (chosen.rows, chosen.defaults, chosen.baseline)
    assert len(plan.cells(name, again, [0, 1])) == 2 * len(rows.rows)


def test_the_published_results_are_those_of_the_rows(module, tmp_path):
    """As docs/results.md promises, the suite continues from them."""
    plan, suite = module("_plan"), module("suite")
    (tmp_path / "results.jsonl").write_bytes(gzip.decompress((FOLDER / "results.jsonl.gz").read_bytes()))
    results = suite.Results(tmp_path / "results.jsonl")
    tune, rows = (read_rows(str(FOLDER / f"{name}.toml")) for name in ("tune", "rows"))
    scores = {line["row"]: line["validation"]["overall"] for line in results.lines if line["stage"] == "tune"}
    cells = [*plan.cells("tune", tune, [100]), *plan.cells("rows", plan.tuned(rows, tune, scores), range(3))]
    assert sum(results.of(cell) is not None for cell in cells) == len(results.lines)
    for chosen, row in zip(cells[len(tune.rows) :], plan.cells("rows", rows, range(3)), strict=True):
        assert chosen.run.training.plan == row.run.training.plan  # rows.toml has the rates that won
        assert chosen.run.training.optimizer == row.run.training.optimizer


def test_the_suite_resumes_and_its_tables_follow(module, data, tmp_path, capsys):
    output = tmp_path / "out" / "results.jsonl"
    arguments = [str(data), "--output", str(output), "--seeds", "2", "--jobs", "1"]
    for name in ("tune", "rows", "ablations"):
        arguments += [f"--{name}", str(tmp_path / f"{name}.toml")]
    suite, table = module("suite"), module("table")
    assert suite.main([*arguments, "--minutes", "0"]) == 3
    assert not output.exists()
    assert suite.main(arguments) == 3  # a failed run is tried again by the next part
    first = [json.loads(line) for line in output.read_text().splitlines()]
    runs = [(line["stage"], line["row"], line["seed"]) for line in first]
    assert runs == [
        ("tune", "phase1_random.slow", 100), ("tune", "phase1_random.diverges", 100), ("tune", "probe_ce.sgd", 100),
        ("rows", "lpt", 0), ("rows", "probe", 0), ("rows", "lpt", 1), ("rows", "probe", 1), ("ablations", "fails", 0),
    ]  # fmt: skip
    assert first[1]["diverged"]
    assert "32 px" in first[-1]["error"]
    assert not any({"test", "shift"} & set(line) for line in first[:3])
    assert first[3]["settings"]["training"]["shared"]["learning_rate"] == 0.001
    assert first[3]["settings"]["training"]["group"]["epochs"] == 1
    for line in first[3:-1]:
        for split in ("validation", "test", "shift"):
            pairs = list(zip(line[split]["prediction"], line[split]["target"], strict=True))
            assert [target for _, target in pairs] == [0] * 4 + [1] * 2 + [2]
            accuracies = [np.mean([p == t for p, t in pairs if t == label]) for label in range(3)]
            assert line[split]["overall"] == pytest.approx(np.mean(accuracies))
    assert suite.main(arguments) == 3
    assert [json.loads(line)["row"] for line in output.read_text().splitlines()[len(first) :]] == ["fails"]
    capsys.readouterr()
    table.main([str(output), "--baseline", "probe", "--figure", str(tmp_path / "emoji.png")])
    lines = capsys.readouterr().out.splitlines()
    test, shift = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| lpt "))
    for cells, split in ((test, "test"), (shift, "shift")):
        means = [100 * line[split]["overall"] for line in first if line["row"] == "lpt"]
        assert cells[2].split()[0] == f"{np.mean(means):.1f}"
    with Image.open(tmp_path / "emoji.png") as picture:
        assert picture.width == 1200


def test_run_sh_unpacks_and_starts_the_suite(module, data, tmp_path):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "vit.safetensors")
    module("pack").pack(data, tmp_path / "vit.safetensors", tmp_path / "packed")
    files = [word for name in ("tune", "rows", "ablations") for word in (f"--{name}", str(tmp_path / f"{name}.toml"))]
    work = tmp_path / "work"
    command = [
        "sh",
        str(FOLDER / "run.sh"),
        str(tmp_path / "packed"),
        str(work),
        *files,
        "--jobs",
        "1",
        "--minutes",
        "0",
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(FOLDER.parents[2])}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 3, found.stderr
    assert found.stdout.startswith("Runs are left")
    assert (work / "vit.safetensors").exists()
    assert len(list((work / "emoji_lt" / "train").rglob("*.png"))) == sum(COUNTS.values())
