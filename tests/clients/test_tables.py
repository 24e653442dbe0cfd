"""Every cell in the tables of docs/how-to/works-with.md names an existing test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "works-with.md").read_text(encoding="utf-8")


def test_named_tests_exist():
    named = set(re.findall(r"[`\"](tests/[\w/]+\.py)::(\w+)[`\"]", PAGE))
    assert len(named) > 20
    for file, name in named:
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"


def test_every_cell_names_a_test_or_is_empty():
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    width = None
    for feature, *cells in ([cell.strip() for cell in row] for row in rows):
        if feature == "feature":  # the head of a table
            width = len(cells)
            continue
        assert len(cells) == width, feature
        for cell in cells:
            name = r"tests/[\w/]+\.py::\w+"
            assert cell == "–" or re.fullmatch(rf'`{name}`|<abbr title="{name}">✓</abbr>', cell), (feature, cell)
