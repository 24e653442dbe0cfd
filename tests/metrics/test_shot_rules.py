"""Shot rules by hand and by property."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft import recipe
from lpt_peft.errors import ConfigError
from lpt_peft.metrics import SHOT_RULES, ShotMetrics, ShotRule, shot_groups, shot_metrics
from tests.metrics.oracle import COUNTS

TABLE = [19, 20, 21, 99, 100, 101]  # groups below: 0 many, 1 medium, 2 few, by hand
BY_HAND = {"lift": [2, 1, 1, 1, 1, 0], "oltr": [2, 2, 1, 1, 0, 0], "lpt": [2, 2, 1, 1, 1, 0]}
WORDS = {
    "lift": "many: n > 100, medium: 20 <= n <= 100, few: n < 20",
    "oltr": "many: n >= 100, medium: 20 < n < 100, few: n <= 20",
    "lpt": "many: n > 100, medium: 20 < n <= 100, few: n <= 20",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_published_rules_at_boundary_counts(name):
    assert shot_groups(TABLE, SHOT_RULES[name]).tolist() == BY_HAND[name]
    assert str(SHOT_RULES[name]) == WORDS[name]
    metrics = ShotMetrics.from_rule(name, TABLE)
    right = torch.tensor([0, 1, 2, 0, 1, 2])  # classes 0, 1, 2 are always correct and 3, 4, 5 never
    metrics.update(right, torch.arange(6))
    result = metrics.compute()
    rates = [1, 1, 1, 0, 0, 0]
    for group, label in enumerate(("many", "medium", "few")):
        selected = [rate for rate, where in zip(rates, BY_HAND[name], strict=True) if where == group]
        assert getattr(result, label) == pytest.approx(sum(selected) / len(selected))
    assert result.rule == WORDS[name] + "; mean over classes"


def test_rule_names_and_default():
    assert set(SHOT_RULES) == set(BY_HAND)
    assert ShotMetrics(COUNTS).rule == SHOT_RULES["lpt"] == ShotRule()
    assert shot_groups(TABLE).tolist() == BY_HAND["lpt"]
    assert shot_metrics([1] * 6, [1] * 6, TABLE).rule == WORDS["lpt"] + "; mean over classes"
    assert shot_groups([0]).tolist() == [2]  # no training image


@given(st.integers(0, 30), st.integers(0, 30), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rule_partitions_all_counts_or_overlaps(many, few, many_inclusive, few_inclusive):
    counts = list(range(40))
    is_many = [n >= many if many_inclusive else n > many for n in counts]
    is_few = [n <= few if few_inclusive else n < few for n in counts]
    arguments = {"many": many, "few": few, "many_inclusive": many_inclusive, "few_inclusive": few_inclusive}
    if any(a and b for a, b in zip(is_many, is_few, strict=True)):
        with pytest.raises(ConfigError, match="overlap"):
            ShotRule(**arguments)
        return
    rule = ShotRule(**arguments)
    groups = [0 if a else 2 if b else 1 for a, b in zip(is_many, is_few, strict=True)]
    assert shot_groups(counts, rule).tolist() == groups
    # str(rule), evaluated as Python, gives the same groups.
    words = dict(group.split(": ") for group in str(rule).split(", "))
    read = {name: [words[name] != "none" and eval(words[name], {"n": n}) for n in counts] for name in words}
    assert read == {name: [g == i for g in groups] for i, name in enumerate(("many", "medium", "few"))}


def test_rule_without_medium():
    rule = ShotRule(many=20, few=20, many_inclusive=True, few_inclusive=False)
    assert str(rule) == "many: n >= 20, medium: none, few: n < 20"
    assert shot_groups([19, 20], rule).tolist() == [2, 0]


def test_invalid_rules():
    with pytest.raises(ConfigError, match=r"many=20 and few=20 overlap.*20 training images"):
        ShotMetrics(COUNTS, many=20, few=20, many_inclusive=True, few_inclusive=True)
    for invalid in (-1, 2.5, True, "20"):
        with pytest.raises(ConfigError, match=r"few=.*integer of at least 0"):
            ShotMetrics(COUNTS, few=invalid)
    with pytest.raises(ConfigError, match=r"many=.*integer of at least 0"):
        ShotMetrics(COUNTS, many=None)
    with pytest.raises(ConfigError, match="'imagenet' is unknown: pass lpt, lift, oltr"):
        ShotMetrics.from_rule("imagenet", COUNTS)
    for call in (lambda: ShotMetrics(COUNTS, average="micro"), lambda: shot_metrics([1], [1], [1], average="micro")):
        with pytest.raises(ConfigError, match=r"average='micro'.*'class'.*'image'"):
            call()


def test_functions_of_the_recipe_use_the_default_rule():
    defaults = {
        name: inspect.signature(getattr(recipe, name)).parameters["shot_rule"].default
        for name in recipe.__all__
        if inspect.isfunction(getattr(recipe, name))
        and "shot_rule" in inspect.signature(getattr(recipe, name)).parameters
    }
    assert defaults
    assert set(defaults.values()) == {"lpt"}
