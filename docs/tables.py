"""Writes the two tables of docs/backbones.md from measurements: `python docs/tables.py` (about ten minutes).

The first table is the result of tests/backbones/test_compatibility.py, cell by cell. The second is the answer of
`lpt-peft doctor --list` for every model of the installed libraries.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
COMPATIBILITY = "tests/backbones/test_compatibility.py"
COLUMNS = {
    "test_compile": "compile",
    "test_export": "export",
    "test_onnx": "ONNX",
    "test_checkpointing": "checkpointing",
    "test_ddp": "DDP",
    "test_fsdp2": "FSDP2",
    "test_lora": "LoRA",
    "test_autocast": "autocast",
    "test_pickle": "pickle",
    "test_threads": "threads",
}
SIGNS = {"passed": "✓", "skipped": "–"}


class Outcomes:
    """A pytest plugin that records the outcome of every cell."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a result; pytest calls this for the setup, call and teardown of each test."""
        found = re.fullmatch(rf"{COMPATIBILITY}::(\w+)\[(?:shared|group)-(.+)\]", report.nodeid)
        if found and (report.when == "call" or report.outcome != "passed"):
            self.cells.setdefault((found[2], found[1]), set()).add(report.outcome)


def compatibility_table() -> str:
    """The table of test results: a row for each model, a column for each test, both phases in a cell."""
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / COMPATIBILITY)], plugins=[outcomes])
    rows = list(dict.fromkeys(row for row, _ in outcomes.cells))
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        cells = []
        for test in COLUMNS:
            outcome = outcomes.cells.get((row, test), {"missing"})
            cells.append(SIGNS.get(outcome.pop(), "✗") if len(outcome) == 1 else "✗")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def support_table() -> str:
    """The table of supported models: a row for each family of the installed libraries and each answer."""
    from lpt_peft.cli.common.doctor_list import families, survey  # noqa: PLC0415 - needs the extra [cli]

    lines = ["| library | family | models | such as | takes prompts |", "|---|---|---|---|---|"]
    answers = families([(entry, short(answer)) for entry, answer in survey("*")])
    lines += [f"| {x.library} | {x.family} | {x.models} | `{x.example}` | {x.answer} |" for x in answers]
    return "\n".join(lines)


def short(answer: str) -> str:
    """Shorten an answer to its reason, so that models of several classes with the same reason share a row."""
    why = re.split(r" Supported: | Its library may have a version|, so prompts cannot be checked", answer)[0]
    why = re.sub(r"^(timm's |torchvision's |transformers )?\w+( of [\w.]+)? (?=has|returns|contains|can|is )", "", why)
    why = why.removeprefix("cannot take prompts: ").replace(" cannot take prompts: ", ": ")
    return answer if answer == "yes" else "no: " + why.rstrip(".").replace("|", "/")


def write(name: str, table: str) -> None:
    """Replace the table between its two marks."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: written by docs/tables.py -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    tables = {"compatibility": compatibility_table, "support": support_table}
    for chosen in sys.argv[1:] or tables:
        write(chosen, tables[chosen]())
