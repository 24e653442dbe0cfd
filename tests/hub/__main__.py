"""Runs the tests of this folder against a local Hub: `python -m tests.hub [pytest arguments]`.

huggingface_hub reads its environment when it is imported, and timm imports it, so the Hub runs and the environment is
set before pytest starts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.hub.server import LocalHub


def main(arguments: list[str]) -> int:
    """Start the Hub, set the environment, run pytest; its exit status."""
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        arguments = [*arguments, str(Path(__file__).parent)]
    local = LocalHub()
    with tempfile.TemporaryDirectory() as home:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            os.environ.pop(name, None)
        os.environ |= {
            "HF_ENDPOINT": local.endpoint,
            "HF_HOME": home,
            "HF_TOKEN_PATH": str(Path(home) / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "LPT_HUB_TESTS": "1",
        }
        try:
            return int(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=[_Plugin(local)]))
        finally:
            local.close()


class _Plugin:
    def __init__(self, local: LocalHub) -> None:
        self.local = local

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[LOCAL_HUB] = self.local


LOCAL_HUB = pytest.StashKey[LocalHub]()

if __name__ == "__main__":
    from tests.hub.__main__ import main as run  # as `tests.hub.__main__`, under which conftest.py finds the key

    sys.exit(run(sys.argv[1:]))
