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


def mypy(folder, *paths):
    """Lines of mypy's answer, as a user sees it: without our settings, other libraries' insides silenced."""
    settings = folder / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--python-version", "3.10"]
    command += ["--no-error-summary", "--cache-dir", str(folder / "cache"), *map(str, paths)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_script_uses_every_public_name():
    source = SCRIPT.read_text()
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert set(lpt_peft.__all__) <= used


@pytest.mark.slow
def test_no_any_shows_through(tmp_path):
    pytest.importorskip("mypy", reason='mypy is not installed: pip install -e ".[test]"')
    wrong = tmp_path / "wrong.py"
    typed = "assert_type(adapter(images), Tensor)"
    wrong.write_text(SCRIPT.read_text().replace(typed, typed.replace("Tensor)", "Any)")))
    (line,) = mypy(tmp_path, SCRIPT, wrong)
    assert line.startswith(str(wrong)), "the script itself has no errors"
    assert 'Expression is of type "Tensor", not "Any"' in line, "mypy does read these assertions"
