"""Settings of every test run, and shared fixtures: tiny ViTs and the golden tensors. No test reads the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Two test processes, and the ranks that they start, share the cores; threads that wait for each other are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

torch.set_num_threads(1)
TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
PROCESSES = 2

# The same examples in every run; `make test-nightly` asks for new examples by --hypothesis-profile=nightly.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Default to `-n 2 --dist loadfile` for the whole suite; a folder, a file or a test runs in this process."""
    option = config.option
    distributes = config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    if not distributes or option.numprocesses is not None or option.dist != "no" or option.usepdb:
        return
    if {Path(argument).resolve() for argument in config.args} & {TESTS, TESTS.parent}:
        option.numprocesses, option.dist = PROCESSES, "loadfile"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Make every test, its fixtures included, independent of earlier tests: generators, compiled code, Accelerate."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "accelerate.state" in sys.modules:  # the first Accelerator of a process fixes its mixed precision
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def tiny_vit(**options: Any) -> VisionTransformer:
    """A two-block ViT of width 24 on 32 px, with weights large enough to matter."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vit = VisionTransformer(**{**settings, **options})
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


@pytest.fixture
def make_vit() -> Callable[..., VisionTransformer]:
    return tiny_vit


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return json.loads(file.metadata()["config"]), tensors


@pytest.fixture
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    return load_golden
