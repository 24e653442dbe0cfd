"""Fixtures of the Hub tests: the local Hub, a client with an empty cache, and short pauses.

Most tests here run only under `python -m tests.hub`, which sets the client's environment before it is imported;
`test_in_own_process.py` starts it from an ordinary pytest run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.hub.server import LocalHub

IN_OWN_PROCESS = "LPT_HUB_TESTS"
REPO = "me/places-lt"

# These tests need an environment that must be set before this process starts.
collect_ignore_glob = [] if IN_OWN_PROCESS in os.environ else ["test_online_*.py"]


@pytest.fixture
def local(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """The local Hub, empty; the client is logged in as `me`, its cache is empty, and its pauses are short."""
    from tests.hub.__main__ import LOCAL_HUB  # noqa: PLC0415 - pytest's own process alone has it

    hub: LocalHub = request.config.stash[LOCAL_HUB]
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.002)))
    yield hub
    hub.silence.set()
    for thread in threading.enumerate():  # pushes that timed out
        if thread.daemon and thread.name.startswith("lpt_peft"):
            thread.join(5)


def transformers_vit() -> torch.nn.Module:
    """A tiny ViT of transformers, the same every time; ImportError if it does not support this client."""
    from transformers import ViTConfig, ViTModel  # noqa: PLC0415 - optional, and it asks for a recent client

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return ViTModel(ViTConfig(**sizes, num_attention_heads=2, intermediate_size=48)).eval()
