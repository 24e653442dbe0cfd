"""k nearest neighbours against scikit-learn and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from lpt_peft.analysis import _inputs, knn_predict
from lpt_peft.errors import ConfigError, InputError
from tests.analysis.oracle import clusters

TRAIN, LABELS = clusters(300, seed=0, spread=1.5)
QUERIES, _ = clusters(150, seed=1, spread=1.5)


def brute(train, labels, query, k, vote, temperature=0.07):
    """Prediction for a query by loops over Python floats."""
    cosines = torch.nn.functional.cosine_similarity(train.double(), query.double()[None]).tolist()
    nearest = sorted(range(len(train)), key=lambda index: -cosines[index])[:k]
    votes = {}
    for index in nearest:
        weight = 1 if vote == "majority" else math.exp((cosines[index] - 1) / temperature)
        votes[int(labels[index])] = votes.get(int(labels[index]), 0) + weight
    best = max(votes.values())
    return next(int(labels[index]) for index in nearest if votes[int(labels[index])] >= best * (1 - 1e-9))


@pytest.mark.parametrize("vote", ["majority", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_match_loops(vote, dtype):
    found = knn_predict(TRAIN.to(dtype), LABELS, QUERIES.to(dtype), k=[20, 5, 1], vote=vote)
    for k, predicted in found.items():
        assert predicted.tolist() == [brute(TRAIN, LABELS, query, k, vote) for query in QUERIES]


@pytest.mark.parametrize("k", [1, 20])
def test_majority_matches_scikit_learn_where_no_two_classes_tie(k):
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(TRAIN.numpy(), LABELS.numpy())
    votes = reference.predict_proba(QUERIES.numpy())
    clear = torch.tensor([sorted(row)[-1] > sorted(row)[-2] for row in votes.tolist()])
    assert clear.double().mean() > 0.9
    expected = torch.from_numpy(reference.predict(QUERIES.numpy()))
    found = knn_predict(TRAIN, LABELS, QUERIES, k=[k])[k]
    assert torch.equal(found[clear], expected[clear])


def test_weighted_vote_matches_scikit_learn():
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: __import__("numpy").exp(-distances / 0.07)
    ).fit(TRAIN.double().numpy(), LABELS.numpy())
    found = knn_predict(TRAIN.double(), LABELS, QUERIES.double(), k=[20], vote="weighted")[20]
    assert found.tolist() == reference.predict(QUERIES.double().numpy()).tolist()


def test_a_tie_goes_to_the_class_of_the_nearest_neighbour():
    angles = torch.tensor([0.3, 0.1, 0.2, 0.4])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(train, [0, 1, 0, 1], query, k=[4, 3, 2, 1]) == {4: 1, 3: 0, 2: 1, 1: 1}


@given(chunk=st.sampled_from([1, 2**13, 2**16]), seed=st.integers(0, 5), scale=st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_result_depends_neither_on_chunks_nor_on_norms(chunk, seed, scale):
    queries, _ = clusters(40, seed=seed)
    expected = knn_predict(TRAIN, LABELS, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inputs, "_CHUNK_BYTES", chunk)
        found = knn_predict(TRAIN, LABELS, scale * queries)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": [301]}, InputError, "at least as many training features"),
        ({"k": []}, ConfigError, "k is empty"),
        ({"k": [0]}, ConfigError, "k=0"),
        ({"vote": "borda"}, ConfigError, "majority"),
        ({"temperature": 0.0}, ConfigError, "temperature=0.0"),
        ({"labels": LABELS[:-1]}, InputError, "299 labels for 300 rows"),
        ({"labels": LABELS - 1}, InputError, "out of range"),
        ({"queries": QUERIES[:, :3]}, InputError, "queries must be floating point"),
        ({"queries": QUERIES.long()}, InputError, "queries must be floating point"),
        ({"queries": QUERIES[:0]}, InputError, "empty"),
        ({"features": TRAIN / 0}, InputError, "features\\[0\\] contains NaN"),
        ({"features": [[1.0]]}, InputError, "features must be a tensor"),
    ],
)
def test_errors_name_input_and_rule(change, error, words):
    arguments = {"features": TRAIN, "labels": LABELS, "queries": QUERIES} | change
    features, labels, queries = (arguments.pop(name) for name in ("features", "labels", "queries"))
    with pytest.raises(error, match=words):
        knn_predict(features, labels, queries, **arguments)
