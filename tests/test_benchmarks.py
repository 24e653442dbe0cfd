"""The scripts of examples/benchmarks: they run at tiny size, and measure correctly. No test asserts a time."""

from __future__ import annotations

import importlib
import json
import mmap
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from tests.conftest import tiny_vit

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
CPU = torch.device("cpu")
TINY = ["--tiny", "--repeats", "1"]
SINGLE_TABLE = [*TINY, "--precisions", "float32", "--batch", "2"]


@pytest.fixture
def script(monkeypatch):
    """A function that imports a file of the folder as a script there does."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def places(table, state="measured"):
    return {(cell.row, cell.column) for cell in table.cells if cell.state == state}


def test_gpu_at_tiny_size(script, tmp_path, capsys):
    gpu = script("gpu")
    report = gpu.main(["--tiny", "--json", str(tmp_path / "gpu.json")])
    expected = {(row, column) for row in gpu.ROWS for column in ("eval", "step")} - {("plain ViT", "step")}
    settings = [(table.precision, table.batch, table.mode) for table in report.tables]
    assert settings == [
        (precision, batch, "eager") for precision in script("_gpu_options").PRECISIONS for batch in (4, 2)
    ]
    for table in report.tables:
        assert places(table) == expected, table.title
        assert all(len(table.cell(*place).samples) == 2 for place in expected)
        for place in expected:
            base = table.cell("plain ViT" if place[1] == "eval" else "full tuning", place[1])
            ratio = statistics.median(table.cell(*place).samples) / statistics.median(base.samples)
            assert table.ratio(table.cell(*place)) == pytest.approx(ratio)
        width, depth, length, classes = 32, 2, 2, 11
        trained = {row: table.cell(row, "step").trained for row in gpu.ROWS}
        assert trained["frozen + head"] == (width + 1) * classes
        assert trained["token concatenation"] == trained["frozen + head"] + depth * length * width
        assert trained["LoRA r=16 on qkv"] == trained["frozen + head"] + depth * 16 * (width + 3 * width)
        assert trained["adapter, phase shared"] == depth * length * width + classes * width

    streams = capsys.readouterr()
    assert f"torch {torch.__version__}" in streams.out
    assert "Nothing was dropped." in streams.out
    headings = re.findall(r"^### (.*)$", streams.out, re.MULTILINE)
    assert headings[:-1] == [table.title for table in report.tables]
    assert headings[-1].startswith("losses alone")
    rows = [line.split("|")[1:-1] for line in streams.out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows if len(row) == 6 and row[0].strip()] == list(gpu.ROWS) * len(report.tables)
    figure = re.compile(r" \d+\.\d\d \(\d+\.\d\d ms\) ")
    assert all(figure.fullmatch(row[2]) for row in rows if len(row) == 6 and row[0].strip())
    assert [row[0].strip() for row in rows if len(row) == 3] == ["", "cross-entropy", "AGCLLoss", "LPTLoss"]
    assert all(f"{table.title}: " in streams.err for table in report.tables)

    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["dropped"] == []
    assert [table["precision"] for table in saved["tables"]] == [table.precision for table in report.tables]
    assert saved["tables"][0]["cells"][0]["samples"] == report.tables[0].cells[0].samples
    assert {(loss["name"], loss["classes"]) for loss in saved["losses"]} == {
        (name, classes) for name in ("cross-entropy", "AGCLLoss", "LPTLoss") for classes in (11, 29)
    }


def test_gpu_compiled(script, capsys):
    gpu = script("gpu")
    report = gpu.main([*TINY, "--modes", "compiled", "--precisions", "bf16 autocast", "--batch", "2"])
    [table] = report.tables
    assert len(places(table)) == 2 * len(gpu.ROWS) - 1, capsys.readouterr().err
    assert "### bf16 autocast, batch 2, compiled" in capsys.readouterr().out


def test_gpu_names_what_the_budget_drops(script, capsys):
    report = script("gpu").main([*TINY, "--budget", "0", "--precisions", "float32"])
    out = capsys.readouterr().out
    assert "Dropped to fit the time budget of 0 s: float32, batch 4, eager; float32, batch 2, eager." in out
    assert not any(places(table) for table in report.tables)
    assert "| full tuning | - | dropped | dropped | - | - |" in out


def test_gpu_drops_the_least_important_cells(script, monkeypatch, capsys):
    gpu = script("gpu")
    slow = property(lambda self: 0.0 if len(self.compilations) < 3 else 1e6)
    monkeypatch.setattr(gpu.Benchmark, "next_compilation", slow)
    report = gpu.main([*SINGLE_TABLE, "--modes", "compiled"])
    [table] = report.tables
    assert places(table) == {("plain ViT", "eval"), ("full tuning", "step"), ("adapter, phase group", "eval")}
    [dropped] = report.dropped()
    assert dropped.startswith("float32, batch 2, compiled (full tuning: eval, frozen + head: eval, ")
    assert dropped.endswith("adapter, phase group: step)")
    assert dropped.count(": ") == 10
    assert f"Dropped to fit the time budget of 240 s: {dropped}." in capsys.readouterr().out


def test_gpu_continues_after_a_cell_without_memory(script, monkeypatch, capsys):
    gpu = script("gpu")
    model = gpu.Benchmark.model

    def scarce(self, row, dtype):
        if row == "full tuning":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if row == "token concatenation":
            raise RuntimeError("no kernel image")
        return model(self, row, dtype)

    monkeypatch.setattr(gpu.Benchmark, "model", scarce)
    [table] = gpu.main(SINGLE_TABLE).tables
    assert places(table, "out of memory") == {("full tuning", "eval"), ("full tuning", "step")}
    assert places(table, "failed") == {("token concatenation", "eval"), ("token concatenation", "step")}
    assert table.ratio(table.cell("adapter, phase group", "step")) is None
    assert table.ratio(table.cell("adapter, phase group", "eval")) > 0
    streams = capsys.readouterr()
    assert "| full tuning | - | out of memory | out of memory | - | - |" in streams.out
    assert "Failed: float32, batch 2, eager: token concatenation, eval: RuntimeError: no kernel image" in streams.out
    assert re.search(r"\| adapter, phase group \| [\d,]+ \| \d+\.\d\d \(\d+\.\d\d ms\) \| \d+\.\d\d ms \|", streams.out)
    assert "full tuning, step: out of memory" in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "3"], "--batch 3: LPTLoss needs two equal halves"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--classes", "1"], "--classes and --loss-classes at least 2"),
    ],
)
def test_gpu_refuses(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script("gpu").main([*TINY, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_gpu_accepts_only_plain_vits_of_timm(script):
    with pytest.raises(SystemExit, match="resnet18 is a ResNet; give a VisionTransformer of timm"):
        script("gpu").main(["--model", "resnet18", "--device", "cpu"])


def test_forward_cost(script, capsys):
    forward_cost = script("forward_cost")
    forward_cost.main(forward_cost.Settings(model="test_vit", batch_size=1, prompt_length=2, rounds=1))
    lines = capsys.readouterr().out.splitlines()
    names = ["plain backbone", "token concatenation", "adapter, phase shared", "adapter, phase group"]
    names.append("adapter, group, block_k")
    assert [line[:24].strip() for line in lines[2:7]] == names
    assert float(lines[7].rpartition(" ")[2]) > 0
    assert lines[2].split()[2:4] == ["1.000", "1.000"]
    assert all(int(line.split()[-2]) > 0 for line in lines[2:7])


@pytest.mark.slow
def test_router_at_tiny_size(script, tmp_path):
    router = script("router")
    settings = router.Settings(epochs=2, copies=1, width=8, shares=(0.0, 0.5, 1.0), test_images=20)
    settings.json, settings.figure = tmp_path / "router.json", tmp_path / "router.png"
    report = router.main(settings)
    assert list(report["routers"]) == list(router.FITS)
    for fitted in report["routers"].values():
        first, _, last = fitted["points"]
        assert (first["share"], first["cost"]) == (0, 1)
        assert (last["share"], last["cost"], last["agreement"]) == (1, 1.5, 1)
        assert last["accuracy"] == pytest.approx(report["exact"]["accuracy"])
        costs = [point["cost"] for point in fitted["points"]]
        assert costs == sorted(costs)
    assert json.loads(settings.json.read_text())["routers"].keys() == router.FITS.keys()
    assert settings.figure.read_bytes().startswith(b"\x89PNG")


def test_interleaved_rounds(script):
    measure, order = script("_measure"), []
    actions = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = measure.interleaved(actions, rounds=2, device=CPU, calls=2)
    assert "".join(order) == "aabb" * 3  # the first round warms up
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_saved_bytes_counts_each_storage_once(script):
    x, weight = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    saved = script("_measure").saved_bytes
    assert saved(lambda: (x * weight) * x, set()) == 3 * 40  # x, weight and x * weight
    assert saved(lambda: (x * weight) * x, {weight.untyped_storage().data_ptr()}) == 2 * 40


def test_resident_bytes(script):
    resident = script("_measure").resident_bytes
    before = resident()
    with mmap.mmap(-1, 2**26) as pages:  # 64 MiB from the system: an allocator may reuse memory of earlier tests
        pages.write(b"1" * 2**26)
        assert resident() - before > 0.9 * 2**26
    assert resident(peak=True) >= resident()


def test_token_concatenation_equals_the_adapter(script):
    vit = tiny_vit(num_classes=0)
    images = torch.randn(3, 3, 32, 32)
    tokens = script("_variants").TokenConcatenation(tiny_vit(num_classes=0), 5, prompt_length=10).eval()
    adapter = LongTailPromptAdapter.wrap(vit, 5).eval()
    with torch.no_grad():
        adapter.shared.prompts.copy_(tokens.prompts)
        torch.testing.assert_close(tokens.features(images), adapter.features(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens.features(images), adapter.unwrap()(images), atol=1e-3)


def test_lora_equals_peft(script):
    peft = pytest.importorskip("peft")
    lora = script("_variants").LoRA(tiny_vit(num_classes=0), 5, rank=4, alpha=8).eval()
    reference = peft.get_peft_model(
        tiny_vit(num_classes=0), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"])
    ).eval()
    with torch.no_grad():
        for block, other in zip(lora.vit.blocks, reference.base_model.model.blocks, strict=True):
            block.attn.qkv.up.normal_()
            other.attn.qkv.lora_A["default"].weight.copy_(block.attn.qkv.down)
            other.attn.qkv.lora_B["default"].weight.copy_(block.attn.qkv.up)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(lora.features(images), reference(images), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in reference.parameters() if p.requires_grad)
    assert sum(p.numel() for n, p in lora.named_parameters() if p.requires_grad and "head" not in n) == trained


def test_digits_search_changes_any_setting_by_name(script):
    search = script("digits_search")
    [row] = [row for row in search.rows(4) if row.name == "LPT"]
    changes = {"shared.learning_rate": 0.5, "init_head": "class_mean", "prompts.query": "block_k"}
    variant = search.changed(row, changes)
    assert (variant.settings.shared.learning_rate, variant.settings.init_head) == (0.5, "class_mean")
    assert variant.settings.group == row.settings.group
    assert variant.build().prompt_config.query == "block_k"
    assert [search._value(text) for text in ("null", "2", "0.5", "final")] == [None, 2, 0.5, "final"]


def test_digits_losses_at_tiny_size(script, capsys):
    losses = script("digits_losses")
    losses.main(losses.Options(epochs=2, divisions=1, learning_rates=(2.0,)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(losses.variants(2)) == 14
    overall = [float(re.search(r"overall ([\d.]+)", line)[1]) for line in lines]
    assert min(overall) > 40, "a head learns something in two epochs; chance is 10"


@pytest.mark.nightly
def test_export_at_tiny_size(script, capsys):
    pytest.importorskip("onnxruntime")
    export = script("export")
    export.main(export.Settings(model="test_vit", batch_size=2, rounds=1, aoti=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6] == "test_vit, phase group, batch 2, 1 threads"
    assert [float(re.search(r"([\d.]+)$", line)[1]) > 0 for line in lines[-5:]] == [True] * 5
    assert lines[-5].endswith("1.00"), "relative to the model in PyTorch"


def test_serve_at_tiny_size(script, capsys):
    serve = script("serve")
    sizes = {"model": "vit_tiny_patch16_224", "img_size": 32, "pixels": 40}
    samples = serve.main(serve.Settings(**sizes, tasks=2, requests=6, clients=3, batch_size=4, rounds=1))
    assert list(samples) == [
        "adapter, a task without swaps",
        "adapter, swaps, an image at a time",
        "adapter, swaps, 4 sorted by task",
        "bank, batches of 4",
        "server, --max-batch 1",
        "server, --max-batch 4",
    ]
    assert min(min(row) for row in samples.values()) >= 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in samples)
    assert "load_prompts: " in printed


def test_bank_at_tiny_size(script, tmp_path, capsys):
    bank = script("bank")
    settings = bank.Settings(
        model="vit_tiny_patch16_224", tiny=True, batch_size=4, tasks=4, num_classes=3, rounds=1, memory_tasks=3,
        capacity=2, json=tmp_path / "bank.json",
    )  # fmt: skip
    report = bank.main(settings)
    assert set(report["speed"]) == {bank.ADAPTER, bank.ONE, bank.MIXED, bank.UNEQUAL}
    assert report["speed"][bank.ONE]["of_one"] == 1
    prompts, head = 192 * (2 * 10 + 20 * 10 + 20), 192 * 3
    memory = report["memory"]
    assert memory["2 slots"] == 3 * (2 * prompts + 8 * 5)
    assert memory["a task, float16 (prompts and head)"] == 2 * (prompts + head)
    assert memory["classifiers of the tasks in slots"] == 2 * (2 * head + 8 * 3)
    assert json.loads((tmp_path / "bank.json").read_text())["memory"] == memory
    assert "bank, mixed tasks" in capsys.readouterr().out
