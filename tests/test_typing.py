"""mypy --strict on a user's script: every public name has a type, and none of them is Any."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lpt_peft

SCRIPT = Path(__file__).parent / "user_script.py"
ROOT = SCRIPT.parents[1]


def mypy(path, folder):
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-version",
        "3.10",
        "--config-file",
        str(folder / "ini"),
    ]
    # A user has no settings of ours; what other libraries do inside is silenced as for any installed package.
    (folder / "ini").write_text(
        "[mypy]\nwarn_unused_ignores = True\nfollow_imports = silent\nignore_missing_imports = True\n"
    )
    command += ["--cache-dir", str(folder / "cache"), str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


def test_the_script_uses_every_public_name():
    source = SCRIPT.read_text()
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert set(lpt_peft.__all__) <= used


@pytest.mark.slow
def test_no_any_shows_through(tmp_path):
    pytest.importorskip("mypy", reason='mypy is not installed: pip install -e ".[test]"')
    done = mypy(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        SCRIPT.read_text().replace("assert_type(adapter(images), Tensor)", "assert_type(adapter(images), Any)")
    )
    done = mypy(wrong, tmp_path)
    assert 'Expression is of type "Tensor", not "Any"' in done.stdout, done.stdout + done.stderr
