"""Shared fixtures: tiny ViTs and the golden tensors. No test reads the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

# Threads that wait for each other on a busy machine make tiny models a hundred times slower.
torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The recipe's tests first: they fork processes that train, and autograd's threads survive no fork."""
    items.sort(key=lambda item: "tests/recipe/" not in item.nodeid)


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
