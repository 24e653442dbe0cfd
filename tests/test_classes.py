"""Class counts and names from mappings, Series and collections without an order."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict, defaultdict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft._classes import counts_in_order, integers_in_order, names_in_order
from lpt_peft.errors import InputError


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_mappings_in_any_order(counts, seed):
    order = list(range(len(counts)))
    random.Random(seed).shuffle(order)
    mapping = {label: counts[label] for label in order}
    forms = [mapping, OrderedDict(mapping), defaultdict(int, mapping), MappingProxyType(mapping)]
    forms += [{str(label): count for label, count in mapping.items()}, json.loads(json.dumps(mapping))]
    forms += [{np.int64(label): count for label, count in mapping.items()}]
    assert all(counts_in_order(form) == counts for form in forms)
    names = [f"name {label}" for label in range(len(counts))]
    by_name = {names[label]: counts[label] for label in order}
    assert counts_in_order(by_name, label_names=names) == counts
    label_of, name_of = {names[label]: label for label in order}, {label: names[label] for label in order}
    for form in (label_of, name_of, json.loads(json.dumps(name_of)), {k: torch.tensor(v) for k, v in label_of.items()}):
        assert names_in_order(form) == tuple(names)


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_counter_of_labels(labels):
    labels = [*range(max(labels) + 1), *labels]  # every class has an image
    assert counts_in_order(Counter(labels)) == np.bincount(labels).tolist()


@pytest.mark.parametrize("values", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), range(2)])
def test_ordered_values_are_unchanged(values):
    assert counts_in_order(values) is values


def test_pandas_series():
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([2, 0, 2, 1, 2, 0])
    assert counts_in_order(labels.value_counts()) == [2, 1, 3]  # value_counts sorts by frequency
    assert counts_in_order(pandas.Series([5, 6])) == [5, 6]
    assert names_in_order(pandas.Series(["dog", "cat"], index=[1, 0])) == ("cat", "dog")
    with pytest.raises(InputError, match="several entries for the label 1"):
        counts_in_order(pandas.Series([5, 6, 7], index=[0, 1, 1]))
    with pytest.raises(InputError, match="is a DataFrame; it is a table: pass the column"):
        counts_in_order(pandas.DataFrame({"count": [1, 2]}))


def generator():
    yield from (3, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({1, 3}, "counts is a set; its entries are not in the order of the labels"),
        (frozenset({1}), "is a frozenset"),
        ({0: 3}.keys(), "is a dict_keys; its entries are not in the order"),
        ({0: 3}.items(), "is a dict_items"),
        (Counter([1, 0]).values(), "is a dict_values; .*order of insertion.*pass the dictionary"),
        (generator(), "is a generator; it can be read only once"),
        (iter([3, 1]), "is a list_iterator; it can be read only once"),
        (map(int, "31"), "is a map; it can be read only once"),
        ({}, "counts is an empty dict"),
        (Counter(), "counts is an empty Counter"),
        (
            Counter([0, 2, 2, 7]),
            "Counter with 3 entries.* 0 to 2: missing 1, out of range 7.*bincount",
        ),
        ({1: 5, 2: 6}, "missing 0, out of range 2"),
        ({-1: 5, 0: 6}, "missing 1, out of range -1"),
        ({10**12: 5, 0: 6}, "missing 1, out of range 1000000000000"),
        (
            dict.fromkeys(range(7, 20), 1),
            r"missing 0, 1, 2, 3, 4, \.\.\., out of range 13, 14, 15, 16, 17, \.\.\.",
        ),
        ({"0": 3, 0: 4}, "several entries for the label 0"),
        ({"cat": 3, "dog": 4}, "has 'cat' where an integer label is needed.*order of the classes is unknown.*bincount"),
        ({0.0: 3, 1.0: 4}, r"has 0\.0 where an integer label is needed"),
        ({True: 3, False: 4}, "has True where an integer label is needed"),
        ({None: 3}, "has None where an integer label is needed"),
        (Counter(torch.tensor([0, 0, 1])), "tensors as keys, and equal tensors are different keys.*bincount"),
    ],
)
def test_counts_without_a_known_order(values, words):
    with pytest.raises(InputError, match=words):
        counts_in_order(values, "counts")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cat", "label_names must be one string per class.*not the text 'cat'"),
        (b"cat", "not the text b'cat'"),
        (7, "one string per class, not 7"),
        (None, "one string per class, not None"),
        ({"cat", "dog"}, "label_names is a set; its entries are not in the order of the labels"),
        ((name for name in ["cat"]), "is a generator"),
        (["cat", 3], r"label_names\[1\]=3 must be a string"),
        (["cat", b"dog"], r"label_names\[1\]=b'dog' must be a string"),
        ({0: "cat", 1: None}, r"label_names\[1\]=None must be a string"),
        (["cat", "dog", "cat"], "has 'cat' for the classes 0 and 2: rename"),
        (
            ["caf\u00e9", "cafe\u0301"],
            r"has 'caf\\xe9' for the class 0 and 'cafe\\u0301' for the class 1.*up to Unicode normalization",
        ),
        ({0: "cat", 1: "cat"}, "has 'cat' for the classes 0 and 1"),
        ({"cat": 0, "kitten": 0, "dog": 1}, "maps both 'cat' and 'kitten' to the label 0"),
        ({"cat": 1, "dog": 2}, "missing 0, out of range 2"),
        ({"cat": 0.0, "dog": 1.0}, r"has 0\.0 where an integer label is needed"),
        ({"cat": "0", "dog": "1"}, "has 'cat' where an integer label is needed"),
        ({}, "label_names is an empty dict"),
    ],
)
def test_invalid_names(names, words):
    with pytest.raises(InputError, match=words):
        names_in_order(names)


def test_names_of_numpy_and_repeated_names():
    names = names_in_order(np.array(["cat", "dog"]))
    assert names == ("cat", "dog")
    assert {type(name) for name in names} == {str}
    assert names_in_order(["crane", "crane"], unique=False) == ("crane", "crane")
    assert names_in_order([]) == ()


@pytest.mark.parametrize(
    "counts", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), {1: 1, 0: 3}, [np.int32(3), torch.tensor(1)]]
)
def test_integers_in_order(counts):
    values = integers_in_order(counts)
    assert values == (3, 1)
    assert {type(value) for value in values} == {int}


@pytest.mark.parametrize("counts", [7, None, [1.5, 2.0], ["3"], [True, 2], [None], torch.tensor([[1]]), {0: 1.0}])
def test_integers_in_order_of_other_values(counts):
    with pytest.raises(InputError, match="class_counts must be one integer per class"):
        integers_in_order(counts)
