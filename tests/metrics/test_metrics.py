"""lpt_peft.metrics against brute force, torchmetrics and scikit-learn, by property, and over two processes."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lpt_peft.errors import ConfigError, InputError, LPTError
from lpt_peft.metrics import SHOT_RULES, ShotMetrics, ShotRule, shot_groups, shot_metrics
from tests.host_reads import count_host_reads

COUNTS = [500, 150, 101, 100, 60, 21, 20, 19, 3, 0]
SIZE = len(COUNTS)


def draw(images, size=SIZE, seed=0, absent=(), dtype=torch.float32):
    """Logits that are right about a third of the time, and targets without the absent classes."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([label for label in range(size) if label not in absent])
    target = allowed[torch.randint(len(allowed), (images,), generator=generator)]
    logits = torch.randn(images, size, generator=generator, dtype=torch.float64)
    logits[torch.arange(images), target] += 2.0 * torch.rand(images, generator=generator, dtype=torch.float64)
    return logits.to(dtype), target


def filled(logits, target, **settings):
    metrics = ShotMetrics(COUNTS, **settings)
    metrics.update(logits, target)
    return metrics


def brute(predicted, target, is_many, is_few, average):
    """Every figure but the calibration error, by loops over images written from the definitions."""
    hits = {}
    for guess, truth in zip(predicted, target, strict=True):
        hits.setdefault(truth, []).append(guess == truth)
    accuracy = {label: sum(hits[label]) / len(hits[label]) for label in hits}

    def mean(labels):
        labels = [label for label in labels if label in hits]
        if not labels:
            return None
        if average == "class":
            return sum(accuracy[label] for label in labels) / len(labels)
        return sum(sum(hits[label]) for label in labels) / sum(len(hits[label]) for label in labels)

    labels = range(SIZE)
    worst = min(hits, key=lambda label: (accuracy[label], label))
    zero = 0.0 in accuracy.values()
    return {
        "num_images": len(target),
        "overall": mean(labels),
        "many": mean(j for j in labels if is_many(COUNTS[j])),
        "medium": mean(j for j in labels if not is_many(COUNTS[j]) and not is_few(COUNTS[j])),
        "few": mean(j for j in labels if is_few(COUNTS[j])),
        "accuracy": sum(sum(row) for row in hits.values()) / len(target),
        "balanced_accuracy": sum(accuracy.values()) / len(accuracy),
        "geometric_mean": 0.0 if zero else math.prod(accuracy.values()) ** (1 / len(accuracy)),
        "harmonic_mean": 0.0 if zero else len(accuracy) / sum(1 / value for value in accuracy.values()),
        "worst_class": worst,
        "worst_accuracy": accuracy[worst],
        "absent_classes": [j for j in labels if j not in hits],
        "per_class": [accuracy.get(j) for j in labels],
    }


def brute_ece(logits, target, bins=15):
    """Guo et al. (2017), equation 3, in float64 by a loop over bins (a, b]."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == target
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.sum() / len(target) * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def assert_same(result, expected, abs=1e-12):
    """Equal figures by name; numbers and lists of numbers up to `abs`."""
    assert set(expected) == set(result)
    for name, value in expected.items():
        values, figures = (value, result[name]) if isinstance(value, list) else ([value], [result[name]])
        assert len(values) == len(figures), name
        for ours, theirs in zip(figures, values, strict=True):
            assert ours == (pytest.approx(theirs, abs=abs) if isinstance(theirs, float) else theirs), name


# --- rules ------------------------------------------------------------------------------------------------------------

TABLE = [19, 20, 21, 99, 100, 101]  # 0 many, 1 medium, 2 few; by hand, from the rules as method.md trap 12 words them
BY_HAND = {"lift": [2, 1, 1, 1, 1, 0], "oltr": [2, 2, 1, 1, 0, 0], "lpt": [2, 2, 1, 1, 1, 0]}
WORDS = {
    "lift": "many: n > 100, medium: 20 <= n <= 100, few: n < 20",
    "oltr": "many: n >= 100, medium: 20 < n < 100, few: n <= 20",
    "lpt": "many: n > 100, medium: 20 < n <= 100, few: n <= 20",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_published_rule_groups_the_boundary_counts_as_written(name):
    assert shot_groups(TABLE, SHOT_RULES[name]).tolist() == BY_HAND[name]
    assert str(SHOT_RULES[name]) == WORDS[name]
    metrics = ShotMetrics.from_rule(name, TABLE)
    right = torch.tensor([0, 1, 2, 0, 1, 2])  # classes 0, 1, 2 are always right and 3, 4, 5 always wrong
    metrics.update(right, torch.arange(6))
    result = metrics.compute()
    rates = [1, 1, 1, 0, 0, 0]
    for group, label in enumerate(("many", "medium", "few")):
        chosen = [rate for rate, where in zip(rates, BY_HAND[name], strict=True) if where == group]
        assert getattr(result, label) == pytest.approx(sum(chosen) / len(chosen))
    assert result.rule == WORDS[name] + "; mean over classes"


def test_rule_names_cover_the_documented_ones_and_the_default_is_lift():
    assert set(SHOT_RULES) == set(BY_HAND)
    assert ShotMetrics(COUNTS).rule == SHOT_RULES["lift"]
    assert shot_groups(TABLE).tolist() == BY_HAND["lift"]
    assert shot_groups([0]).tolist() == [2]  # never seen in training


@given(st.integers(0, 30), st.integers(0, 30), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_rule_parts_all_counts_or_is_refused(many, few, many_inclusive, few_inclusive):
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
    # The words, read as Python, say the same.
    words = dict(part.split(": ") for part in str(rule).split(", "))
    read = {name: [words[name] != "none" and eval(words[name], {"n": n}) for n in counts] for name in words}
    assert read == {name: [g == i for g in groups] for i, name in enumerate(("many", "medium", "few"))}


def test_a_rule_without_medium_says_so():
    rule = ShotRule(many=20, few=20, many_inclusive=True)
    assert str(rule) == "many: n >= 20, medium: none, few: n < 20"
    assert shot_groups([19, 20], rule).tolist() == [2, 0]


def test_refused_rules():
    with pytest.raises(ConfigError, match=r"many=20 and few=20 overlap.*20 training images"):
        ShotMetrics(COUNTS, many=20, few=20, many_inclusive=True, few_inclusive=True)
    for bad in (-1, 2.5, True, "20"):
        with pytest.raises(ConfigError, match=r"few=.*whole number"):
            ShotMetrics(COUNTS, few=bad)
    with pytest.raises(ConfigError, match=r"many=.*whole number"):
        ShotMetrics(COUNTS, many=None)
    with pytest.raises(ConfigError, match="'imagenet' is unknown; pass lift, oltr, lpt"):
        ShotMetrics.from_rule("imagenet", COUNTS)
    for call in (lambda: ShotMetrics(COUNTS, average="micro"), lambda: shot_metrics([1], [1], [1], average="micro")):
        with pytest.raises(ConfigError, match=r"average='micro'.*'class'.*'image'"):
            call()


# --- figures against oracles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["class", "image"])
@pytest.mark.parametrize("absent", [(), (0, 9), (7, 8, 9), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("name", ["lift", "oltr"])
def test_all_figures_equal_brute_force(average, absent, name):
    logits, target = draw(200, absent=absent)
    metrics = ShotMetrics.from_rule(name, COUNTS, average=average)
    for part in range(0, 200, 64):
        metrics(logits[part : part + 64], target[part : part + 64])
    is_many = (lambda n: n > 100) if name == "lift" else (lambda n: n >= 100)
    is_few = (lambda n: n < 20) if name == "lift" else (lambda n: n <= 20)
    expected = brute(logits.argmax(1).tolist(), target.tolist(), is_many, is_few, average)
    result = metrics.compute().to_dict()
    rule, error = result.pop("rule"), result.pop("expected_calibration_error")
    assert error == pytest.approx(brute_ece(logits.double().numpy(), target.numpy()), abs=1e-6)
    assert_same(result, expected)
    assert result["absent_classes"] == list(absent)
    assert rule.endswith("mean over classes" if average == "class" else "mean over images")


@pytest.mark.parametrize("absent", [(), (4, 9)])
def test_accuracies_equal_torchmetrics_and_sklearn(absent):
    logits, target = draw(1000, absent=absent)
    result = filled(logits, target).compute()
    top1 = MulticlassAccuracy(SIZE, average="micro")(logits, target)
    assert result.accuracy == pytest.approx(float(top1), abs=1e-6)
    if not absent:  # torchmetrics counts a class that is predicted but absent as 0; we never do
        macro = MulticlassAccuracy(SIZE, average="macro")(logits, target)
        assert result.balanced_accuracy == pytest.approx(float(macro), abs=1e-6)
    each = MulticlassAccuracy(SIZE, average="none")(logits, target).tolist()
    assert [None if j in absent else pytest.approx(each[j], abs=1e-6) for j in range(SIZE)] == list(result.per_class)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # scikit-learn warns of classes that are predicted but absent, and leaves them out
        balanced = balanced_accuracy_score(target.numpy(), logits.argmax(1).numpy())
    assert result.balanced_accuracy == pytest.approx(balanced, abs=1e-12)
    assert result.overall == result.balanced_accuracy
    assert filled(logits, target, average="image").compute().overall == result.accuracy


def test_geometric_and_harmonic_mean_when_every_class_is_hit():
    result = shot_metrics([9, 1, 4], [10, 4, 4], [500, 50, 5])
    assert result.geometric_mean == pytest.approx((0.9 * 0.25 * 1.0) ** (1 / 3), abs=1e-12)
    assert result.harmonic_mean == pytest.approx(3 / (1 / 0.9 + 4 + 1), abs=1e-12)
    assert (result.worst_class, result.worst_accuracy) == (1, 0.25)


def test_one_class_at_zero_makes_both_means_zero():
    result = shot_metrics([9, 0, 0], [10, 4, 3], [500, 50, 5])
    assert (result.geometric_mean, result.harmonic_mean, result.worst_class) == (0.0, 0.0, 1)  # the first of equals


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_calibration_error_equals_torchmetrics_and_brute_force(dtype):
    logits, target = draw(1000, dtype=dtype)
    ours = filled(logits, target).compute().expected_calibration_error
    wide = logits if dtype == torch.float64 else logits.float()
    peer = float(MulticlassCalibrationError(SIZE, n_bins=15, norm="l1")(wide, target))
    assert ours == pytest.approx(peer, abs=2e-6)
    assert ours == pytest.approx(brute_ece(wide.double().numpy(), target.numpy()), abs=1e-6)
    assert ours > 0.01


def test_calibration_error_of_saturated_softmax():
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0], [0.0, 200.0], [-200.0, 0.0]])  # all confidences are exactly 1
    metrics = ShotMetrics([5, 5])
    metrics.update(logits, torch.tensor([0, 1, 1, 1]))
    assert metrics.compute().expected_calibration_error == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 5])
def test_bins_are_closed_above(size, dtype):
    """1 / size is the edge between two bins; 0.1 % below it belongs to the same bin, so that errors may cancel."""
    edge = torch.zeros(1, size, dtype=dtype)
    lower, upper = 1 / size - 1 / 15, 1 / size
    rest = torch.full((1, 40), 0.0, dtype=dtype)
    wide = torch.cat([edge, rest - math.inf], dim=1)  # confidence exactly 1 / size among 40 masked classes
    inside = (lower + upper) / 2
    others = (1 - inside) / (size + 39)
    below = torch.full((1, size + 40), math.log(others), dtype=dtype)
    below[0, 0] = math.log(inside)  # confidence in the middle of the bin (lower, upper]
    metrics = ShotMetrics([1] * (size + 40))
    metrics.update(torch.cat([wide, below]), torch.tensor([0, 1]))  # one right, one wrong
    same_bin = abs(1 - upper - inside) / 2
    other_bin = (abs(1 - upper) + inside) / 2
    assert metrics.compute().expected_calibration_error == pytest.approx(same_bin, abs=1e-6)
    assert abs(same_bin - other_bin) > 0.1


def test_masked_classes_and_log_probabilities():
    logits, target = draw(50)
    result = filled(logits, target).compute()
    assert_same(filled(logits.log_softmax(1), target).compute().to_dict(), result.to_dict(), abs=1e-6)
    masked = torch.full((1, SIZE), -math.inf)
    masked[0, 3] = 0.0
    assert filled(masked, torch.tensor([3])).compute().expected_calibration_error == 0.0


# --- labels, absent classes, emptiness --------------------------------------------------------------------------------


def test_predicted_labels_give_all_but_the_calibration_error():
    logits, target = draw(100)
    scored, labelled = filled(logits, target), filled(logits.argmax(1), target)
    expected = scored.compute().to_dict()
    assert expected["expected_calibration_error"] is not None
    assert labelled.compute().to_dict() == {**expected, "expected_calibration_error": None}
    assert labelled.merge(scored).compute().expected_calibration_error is None  # part of the images is not all
    as_lists = filled(logits.argmax(1).tolist(), target.numpy())
    assert as_lists.compute() == filled(logits.argmax(1).int(), target.to(torch.uint8)).compute()


def test_absent_classes_are_listed_and_never_zero():
    result = filled(torch.tensor([0, 1]), torch.tensor([0, 1])).compute()
    assert result.absent_classes == tuple(range(2, SIZE))
    assert result.per_class == (1.0, 1.0) + (None,) * (SIZE - 2)
    assert (result.many, result.medium, result.few) == (1.0, None, None)
    assert (result.overall, result.geometric_mean, result.harmonic_mean, result.worst_class) == (1.0, 1.0, 1.0, 0)


def test_result_is_strict_json():
    for metrics in (ShotMetrics(COUNTS), filled(*draw(20, absent=(7, 8, 9)))):
        plain = metrics.compute().to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_no_image_gives_none():
    for metrics in (ShotMetrics(COUNTS), filled(torch.empty(0, SIZE), torch.empty(0, dtype=torch.int64))):
        result = metrics.compute().to_dict()
        assert result.pop("rule")
        assert result.pop("num_images") == 0
        assert result.pop("absent_classes") == list(range(SIZE))
        assert result.pop("per_class") == [None] * SIZE
        assert set(result.values()) == {None}


def test_reset_forgets():
    metrics = filled(*draw(30))
    metrics.reset()
    assert metrics.compute() == ShotMetrics(COUNTS).compute()


def test_logits_with_gradient_leave_no_graph():
    logits, target = draw(30)
    metrics = filled(logits.requires_grad_(), target)
    assert not any(value.requires_grad for value in vars(metrics).values() if isinstance(value, torch.Tensor))
    assert metrics.compute() == filled(logits.detach(), target).compute()


# --- order, shards, state ---------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_shards_in_any_order_equal_one_pass_exactly(data):
    logits, target = draw(40, seed=data.draw(st.integers(0, 5)))
    whole = filled(logits, target).compute()
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=40, max_size=40)))
    shuffle = torch.tensor(data.draw(st.permutations(range(40))))
    shards = [filled(logits[shuffle][owner == i], target[shuffle][owner == i]) for i in range(4)]
    merged = ShotMetrics(COUNTS)
    for shard in data.draw(st.permutations(shards)):
        assert merged.merge(shard) is merged
    assert merged.compute() == whole  # to the last digit
    assert filled(logits[shuffle], target[shuffle]).compute() == whole


@given(st.permutations(range(SIZE)))
@settings(max_examples=20, deadline=None)
def test_renaming_the_classes_changes_no_mean(order):
    logits, target = draw(200)
    renamed = ShotMetrics([COUNTS[j] for j in order])
    renamed.update(logits[:, list(order)], torch.tensor([list(order).index(label) for label in target.tolist()]))
    ours, theirs = renamed.compute().to_dict(), filled(logits, target).compute().to_dict()
    assert ours.pop("per_class") == [theirs["per_class"][j] for j in order]
    assert theirs["worst_class"] is not None
    assert theirs["per_class"][order[ours.pop("worst_class")]] == theirs["worst_accuracy"]
    del theirs["per_class"], theirs["worst_class"]
    assert_same(ours, theirs, abs=1e-6)  # the float32 softmax adds its terms in another order


def test_merge_leaves_the_other_and_keeps_the_own_rule():
    first, second = filled(*draw(30, seed=1)), ShotMetrics.from_rule("oltr", COUNTS)
    second.update(*draw(20, seed=2))
    before = second.compute()
    first.merge(second)
    second.update(*draw(5, seed=3))
    assert first.compute().num_images == 50
    assert first.rule == SHOT_RULES["lift"]
    assert before.num_images == 20


def test_merge_refuses_others():
    for other in (ShotMetrics([1, 2]), ShotMetrics([*COUNTS[:-1], 1]), None, {}):
        with pytest.raises(InputError, match=r"other must be a ShotMetrics with the same class_counts"):
            ShotMetrics(COUNTS).merge(other)


def test_state_copies_and_resumes(tmp_path):
    half, rest = draw(30, seed=1), draw(30, seed=2)
    metrics = filled(*half)
    torch.save(metrics.state_dict(), tmp_path / "state.pt")
    copies = [copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics)), ShotMetrics(COUNTS)]
    copies[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    metrics.update(*rest)
    for resumed in copies:
        assert resumed.compute() == filled(*half).compute()
        resumed.update(*rest)
        assert resumed.compute() == metrics.compute()


def test_state_dict_is_a_copy_both_ways():
    metrics = filled(*draw(30))
    expected, state = metrics.compute(), metrics.state_dict()
    for tensor in state.values():
        tensor.zero_()
    assert metrics.compute() == expected
    state = metrics.state_dict()
    metrics.load_state_dict(state)
    state["counters"].zero_()
    assert metrics.compute() == expected


def test_foreign_state_is_refused_and_changes_nothing():
    metrics = filled(*draw(30))
    expected, state = metrics.compute(), metrics.state_dict()
    broken = [
        {},
        {name: tensor for name, tensor in state.items() if name != "counters"},
        {**state, "more": torch.zeros(1)},
        {**state, "counters": state["counters"][:-1]},
        {**state, "counters": state["counters"].double()},
        ShotMetrics([1, 2, 3]).state_dict(),
    ]
    for bad in broken:
        with pytest.raises(InputError, match=r"state must hold .*pass a state_dict\(\) of as many classes"):
            metrics.load_state_dict(bad)
    with pytest.raises(InputError, match="other class_counts"):
        metrics.load_state_dict({**state, "class_counts": state["class_counts"] + 1})
    assert metrics.compute() == expected


# --- refused input ----------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, SIZE)
LABELS = torch.tensor([1, 2])
BAD_BATCHES = {
    "too large": (GOOD, torch.tensor([1, SIZE]), r"target\[1\]=10 is out of range.*0 to 9.*class_counts"),
    "negative": (GOOD, torch.tensor([-1, 1]), r"target\[0\]=-1 is out of range"),
    "predicted too large": (torch.tensor([SIZE, 0]), LABELS, r"logits\[0\]=10 is out of range"),
    "one-hot target": (
        GOOD,
        GOOD.long(),
        r"target must be integers \(N,\), not torch.int64 of shape \(2, 10\).*argmax",
    ),
    "float target": (GOOD, LABELS.float(), r"target must be integers \(N,\), not torch.float32"),
    "bool target": (GOOD, LABELS.bool(), r"target must be integers \(N,\), not torch.bool"),
    "words": (GOOD, ["a", "b"], "target must be a tensor or sequence of integers"),
    "ragged": (GOOD, [[1], [1, 2]], "target must be a tensor or sequence of integers"),
    "columns": (torch.zeros(2, SIZE - 1), LABELS, r"logits must be \(B, 10\).*not \(2, 9\)"),
    "no columns": (torch.zeros(2), LABELS, r"logits must be \(B, 10\).*not \(2,\).*integers"),
    "three dimensions": (torch.zeros(2, 3, SIZE), LABELS, r"logits must be \(B, 10\)"),
    "integer scores": (GOOD.long(), LABELS, r"logits must be integers \(N,\).*argmax"),
    "complex": (GOOD.to(torch.complex64), LABELS, "logits must be integers"),
    "rows": (torch.zeros(3, SIZE), LABELS, "logits has 3 rows, target 2 labels"),
    "predicted rows": (torch.tensor([1]), LABELS, "logits has 1 rows, target 2 labels"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_refused_batch_is_named_and_nothing_of_it_counts(case):
    logits, target, words = BAD_BATCHES[case]
    metrics = filled(*draw(30))
    before = metrics.state_dict()
    with pytest.raises(InputError, match=words):
        metrics.update(logits, target)
    assert all(torch.equal(before[name], tensor) for name, tensor in metrics.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_without_softmax_are_refused_by_row(value, dtype):
    logits, target = draw(5, dtype=dtype)
    logits[3, 2] = value
    metrics = ShotMetrics(COUNTS)
    with pytest.raises(InputError, match=r"logits\[3\] holds NaN or \+inf"):
        metrics.update(logits, target)
    with pytest.raises(InputError, match=r"logits\[0\] .*nothing but -inf"):
        metrics.update(torch.full((1, SIZE), -math.inf, dtype=dtype), target[:1])
    assert metrics.compute().num_images == 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, -1], r"class_counts\[1\]=-1 is negative"),
        ([], "class_counts"),
        (torch.empty(0, dtype=torch.int64), "class_counts is empty"),
        ([1.5, 2.0], "class_counts must be integers .*float32.*bincount"),
        ([True, False], "class_counts must be integers .*bool"),
        ([[1, 2]], r"class_counts must be integers .*\(1, 2\)"),
        (7, "class_counts must be integers"),
        (["a"], "class_counts must be a tensor or sequence of integers"),
        (None, "class_counts must be a tensor or sequence of integers"),
    ],
)
def test_refused_class_counts(counts, words):
    for call in (ShotMetrics, shot_groups, lambda counts: shot_metrics([1], [1], counts)):
        with pytest.raises(InputError, match=words) as caught:
            call(counts)
        assert isinstance(caught.value, (LPTError, ValueError))


def test_refused_counters():
    with pytest.raises(InputError, match="correct exceeds total for class 1"):
        shot_metrics([1, 3], [2, 2], [5, 5])
    with pytest.raises(InputError, match="one entry per class, not 1, 2 and 2"):
        shot_metrics([1], [2, 2], [5, 5])
    with pytest.raises(InputError, match=r"total\[0\]=-2 is negative"):
        shot_metrics([0, 0], [-2, 2], [5, 5])


def test_counts_of_the_caller_are_copied():
    counts = torch.tensor(COUNTS)
    metrics = ShotMetrics(counts)
    counts.zero_()
    assert metrics.class_counts.tolist() == COUNTS


# --- size, devices, processes -----------------------------------------------------------------------------------------


def test_memory_on_inaturalist_is_linear_in_the_classes():
    size = 8142
    metrics = ShotMetrics(torch.randint(2, 1000, (size,), generator=torch.Generator().manual_seed(0)))
    for seed in range(3):
        metrics.update(*draw(64, size=size, seed=seed))
    tensors = [value for value in vars(metrics).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert sum(tensor.numel() for tensor in tensors) < 4 * size
    assert len(pickle.dumps(metrics)) < 4 * 8 * size
    assert metrics.compute().num_images == 192


def test_a_default_device_does_not_move_the_counters():
    logits, target = draw(30)
    with torch.device("meta"):
        result = filled(logits, target).compute()
    assert result == filled(logits, target).compute()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_logits():
    logits, target = draw(100)
    metrics = filled(logits.cuda(), target.cuda())
    assert_same(metrics.compute().to_dict(), filled(logits, target).compute().to_dict(), abs=1e-6)


def test_sync_outside_torch_distributed_does_nothing():
    metrics = filled(*draw(30))
    expected = metrics.compute()
    assert metrics.sync() is metrics
    assert metrics.sync().compute() == expected


WORKER = """
import json, sys, torch
import torch.distributed as dist
from lpt_peft.errors import StateError
from lpt_peft.metrics import ShotMetrics

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
metrics = ShotMetrics(data["counts"])
mine = torch.arange(len(data["target"])) % 3 == 0  # a third of the images here, two thirds there
mine = mine if rank == 0 else ~mine
for part in mine.nonzero().flatten().split(16):
    metrics.update(data["logits"][part], data["target"][part])
local = metrics.compute().num_images
synced = metrics.sync().compute().to_dict()
resumed = ShotMetrics(data["counts"])
resumed.load_state_dict(metrics.state_dict())
merged = ShotMetrics(data["counts"]).merge(metrics)
refused = 0
for again in (metrics, resumed, merged):
    try:
        again.sync()
    except StateError as error:
        refused += "reset()" in str(error)
metrics.reset()
if rank == 0:  # an empty rank takes part
    metrics.update(data["logits"][:7], data["target"][:7])
print(json.dumps([local, refused, synced, metrics.sync().compute().to_dict()]))
dist.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one_exactly(tmp_path):
    logits, target = draw(200, absent=(2, 8))
    torch.save({"logits": logits, "target": target, "counts": torch.tensor(COUNTS)}, tmp_path / "data.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        out = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], out
    whole = filled(logits, target).compute().to_dict()
    few = filled(logits[:7], target[:7]).compute().to_dict()
    answers = [json.loads(text.splitlines()[-1]) for text, _ in out]
    assert answers == [[67, 3, whole, few], [133, 3, whole, few]]


@pytest.mark.parametrize("state", [None, [1], {"counters": [1, 2]}, {"class_counts": None}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(InputError, match="state must hold"):
        ShotMetrics([3, 2]).load_state_dict(state)


@pytest.fixture
def deferred(monkeypatch):
    """Logits of the CPU are treated as those of an accelerator."""
    monkeypatch.setattr("lpt_peft.metrics.accumulator._on_host", lambda tensor: False)


def test_logits_on_a_device_are_fetched_once_and_give_the_same_figures(deferred):
    logits, target = draw(300, dtype=torch.float32)
    metrics = ShotMetrics(COUNTS)
    with count_host_reads() as reads:
        for start in range(0, 300, 70):
            metrics.update(logits[start : start + 70], target[start : start + 70])
    assert all("metrics/checks.py" in place for place in reads.locations), "labels are checked on the CPU"
    metrics.update(target[:5], target[:5])  # predicted labels in between
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpt_peft.metrics.accumulator._on_host", lambda tensor: True)
        wanted = filled(logits, target)
        wanted.update(target[:5], target[:5])
    assert metrics.compute() == wanted.compute() == metrics.compute()
    assert torch.equal(metrics.state_dict()["counters"], wanted.state_dict()["counters"])


@pytest.mark.parametrize("ask", ["compute", "state_dict", "merge", "merged"])
def test_pending_batches_are_counted_by_whatever_asks_for_them(deferred, ask):
    logits, target = draw(20)
    metrics, other = filled(logits, target), ShotMetrics(COUNTS)
    if ask == "merged":
        counters = other.merge(metrics).state_dict()["counters"]
    elif ask == "merge":
        counters = metrics.merge(other).state_dict()["counters"]
    else:
        getattr(metrics, ask)()
        counters = metrics._counters
    assert int(counters[SIZE : 2 * SIZE].sum()) == 20


@pytest.mark.parametrize("forget", ["reset", "load_state_dict"])
def test_pending_batches_are_forgotten_with_the_others(deferred, forget):
    metrics = filled(*draw(20))
    if forget == "reset":
        metrics.reset()
    else:
        metrics.load_state_dict(ShotMetrics(COUNTS).state_dict())
    assert metrics.compute().num_images == 0


def test_pending_logits_without_softmax_are_refused_when_asked_for(deferred):
    metrics = ShotMetrics(COUNTS)
    for number in range(3):
        logits, target = draw(10, seed=number)
        logits[4, 2] = math.nan if number == 1 else 0.0
        metrics.update(logits, target)
    with pytest.raises(InputError, match=r"logits\[14\] holds NaN or \+inf"):
        metrics.compute()
    assert metrics.compute().num_images == 0
