"""The tables of docs/backbones.md are up to date with docs/tables.py, the tests and the census."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.backbones import test_compatibility
from tests.backbones.models import ROWS
from tests.backbones.test_timm_all import CENSUS

PAGE = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
# Column of the table -> the test behind its cells.
COLUMNS = {
    "compile": test_compatibility.test_compile,
    "export": test_compatibility.test_export,
    "ONNX": test_compatibility.test_onnx,
    "checkpointing": test_compatibility.test_checkpointing,
    "DDP": test_compatibility.test_ddp,
    "FSDP2": test_compatibility.test_fsdp2,
    "LoRA": test_compatibility.test_lora,
    "autocast": test_compatibility.test_autocast,
    "pickle": test_compatibility.test_pickle,
    "threads": test_compatibility.test_threads,
}


def table(name: str) -> list[list[str]]:
    body = PAGE.partition(f"<!-- {name}: written by docs/tables.py -->")[2].partition(f"<!-- {name}: end -->")[0]
    lines = [line for line in body.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_compatibility_table_has_every_model_and_every_test():
    head, *lines = table("compatibility")
    assert head[1:] == list(COLUMNS)
    assert [line[0] for line in lines] == list(ROWS)
    for row, *cells in lines:
        for column, cell in zip(COLUMNS, cells, strict=True):
            absent = column == "checkpointing" and ROWS[row].checkpointing is None
            assert cell == ("–" if absent else "✓"), (row, column)


def test_support_table_has_the_census():
    _, *lines = table("support")
    works: Counter[str] = Counter()
    for library, family, models, _, answer in lines:
        if library == "timm" and answer == "yes":
            works[family] += int(models)
    assert works == Counter(CENSUS)
    assert {line[0] for line in lines} == {"lpt_peft", "timm", "transformers", "torchvision", "open_clip"}
