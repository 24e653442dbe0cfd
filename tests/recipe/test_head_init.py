"""Head rows that are kept by class name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft.errors import ConfigError
from lpt_peft.heads import CosineClassifier
from lpt_peft.recipe.training.head_init import copy_head_rows

NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


@given(NAMES, NAMES)
def test_every_class_of_both_keeps_its_row(old, new):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(old), 4, generator=generator)
    head = CosineClassifier(4, len(new))
    before = head.weight.detach().clone()
    text = copy_head_rows(head, new, weight, old)
    for label, name in enumerate(new):
        assert torch.equal(head.weight[label], weight[old.index(name)] if name in old else before[label])
    added, dropped = len(set(new) - set(old)), len(set(old) - set(new))
    if set(new) & set(old):
        assert (f"{added} class" in text) == bool(added)
        assert ("not used" in text) == bool(dropped)
        assert f"the known rows of {len(set(new) & set(old))} class" in text
    else:
        assert text == "The prompt file has none of the classes, so all rows of the head are new"


def test_names_are_compared_after_normalization():
    """A letter with an accent, and a letter and a combining accent."""
    head = CosineClassifier(2, 1)
    copy_head_rows(head, ["caf\u00e9"], torch.tensor([[3.0, 4.0]]), ["cafe\u0301"])
    assert head.weight.tolist() == [[3.0, 4.0]]


def test_the_new_classes_are_named():
    head = CosineClassifier(2, 8)
    text = copy_head_rows(head, [f"new {number}" for number in range(7)] + ["old"], torch.ones(1, 2), ["old"])
    assert text.endswith("7 classes are new: new 0, new 1, new 2, new 3, new 4, ...")


def test_without_names_nothing_is_copied():
    head = CosineClassifier(2, 2)
    before = head.weight.detach().clone()
    assert "no class names" in copy_head_rows(head, ["a", "b"], torch.ones(2, 2), None)
    assert torch.equal(head.weight, before)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ConfigError, match="width 3, those of the run 2"):
        copy_head_rows(CosineClassifier(2, 2), ["a", "b"], torch.ones(2, 3), ["a", "b"])
