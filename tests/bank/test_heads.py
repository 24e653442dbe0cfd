"""Classifiers of any number of classes: the logits, and the memory of thousands of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpt_peft import PromptBank, cosine_logits
from lpt_peft.bank.heads import Head, classify
from tests.bank.tasks import deviation, fill, make_adapter, save
from tests.conftest import tiny_vit


def random_head(classes: int, seed: int, dtype: torch.dtype = torch.float64) -> Head:
    weight = torch.randn(classes, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return Head(weight, weight.double().norm(dim=-1), 5.0 + seed)


@hypothesis.given(
    slots=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    classes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_logits_equal_cosine_logits(slots: list[int], classes: list[int]) -> None:
    heads = {slot: random_head(classes[slot - 1], slot) for slot in set(slots) if slot}
    features = torch.randn(len(slots), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    logits = classify(features, slots, heads)
    assert logits.shape == (len(slots), max((len(head.weight) for head in heads.values()), default=0))
    for row, slot in enumerate(slots):
        count = len(heads[slot].weight) if slot else 0
        assert bool((logits[row, count:] == -torch.inf).all())
        if slot:
            expected = cosine_logits(features[row : row + 1], heads[slot].weight, heads[slot].scale)[0]
            assert torch.allclose(logits[row, :count], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_are_at_least_float32(dtype: torch.dtype) -> None:
    heads = {1: random_head(3, 1, dtype), 2: random_head(4, 2, torch.float32)}
    features = torch.randn(3, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classify(features, [1, 2, 1], heads)
    assert logits.dtype == torch.float32
    expected = cosine_logits(features[:1].float(), heads[1].weight.float(), heads[1].scale)[0]
    assert torch.allclose(logits[0, :3], expected, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns in new memory."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_thousands_of_classes_are_not_copied(tmp_path: Path) -> None:
    """Neither for each image, nor in the slots of other tasks."""
    classes, batch = 20_000, 6
    vit = tiny_vit()
    adapters = {
        name: make_adapter(tiny_vit(), seed, num_classes=count, prompt_length=2, pool_size=3)
        for seed, (name, count) in enumerate({"large": classes, "larger": classes + 1, "small": 3}.items())
    }
    for name, adapter in adapters.items():
        save(adapter, tmp_path / name)
    bank = fill(PromptBank(vit, capacity=32), tmp_path, list(adapters))
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tasks = ["large", "small", "larger"] * 2
    assert deviation(bank(images, tasks), images, adapters, None) < 1e-4
    with LargestTensor() as largest:
        bank(images, tasks)
    assert batch * classes <= largest.elements < 2 * batch * classes < classes * vit.embed_dim
    assert bank.memory()["heads"] == (2 * classes + 4) * (4 * vit.embed_dim + 8)
    assert bank.memory()["slots"] == 33 * 4 * 24 * (2 * 2 + 3 * 2 + 3) + 33 * 8 * 5


def test_tasks_of_more_classes_keep_the_tables(tmp_path: Path) -> None:
    bank = PromptBank(tiny_vit())
    for classes in (3, 5000):
        adapter = make_adapter(tiny_vit(), classes, num_classes=classes)
        save(adapter, tmp_path / str(classes))
    bank.add("3", tmp_path / "3")
    tables = bank._registry._tables.tables
    bank.add("5000", tmp_path / "5000")
    assert bank._registry._tables.tables is tables
