"""The online tests, in a separate process whose client connects to the local Hub: see `tests/hub/__main__.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.conftest import IN_OWN_PROCESS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(IN_OWN_PROCESS in os.environ, reason="this is that process")
def test_online() -> None:
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_online_*.py"))
    command = [sys.executable, "-m", "tests.hub", "-q", "-x", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
