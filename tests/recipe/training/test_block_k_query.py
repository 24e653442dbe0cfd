"""Runs with the block-K query: keys from k-means, the joint phase, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lpt_peft.errors import StateError
from lpt_peft.recipe import train
from lpt_peft.recipe.training.image_passes import ImagePasses
from tests.recipe.tiny import PHASE, SHORT, FailingLoss, PowerCut, result_of, same, striped_data, tiny_adapter


def test_keys_start_at_centers_of_block_k_queries(monkeypatch):
    """With as many groups as distinct queries, k-means returns the queries themselves."""
    dataset, labels = striped_data()
    adapter = tiny_adapter(query="block_k")
    seen = []
    init = adapter.pool.init_keys
    monkeypatch.setattr(
        adapter.pool, "init_keys", lambda queries, seed: seen.append(queries) or init(queries, seed=seed)
    )
    calls = []
    adapter.vit.blocks[-1].register_forward_hook(lambda *_: calls.append(0))
    monkeypatch.setattr(ImagePasses, "queries", _without_the_last_block(calls, ImagePasses.queries))
    train(adapter, dataset, labels, replace(SHORT, shared=replace(PHASE, epochs=0)), progress=False)
    (queries,) = seen
    assert queries.shape == (31, 24)
    torch.testing.assert_close(queries, tiny_adapter(query="block_k").eval().queries(dataset.tensors[0]))


def _without_the_last_block(calls, function):
    def wrapped(*args, **kwargs):
        before = len(calls)
        result = function(*args, **kwargs)
        assert len(calls) == before, "queries of block K need the first K blocks alone"
        return result

    return wrapped


@pytest.mark.parametrize("phases", ["decoupled", "joint"])
def test_a_run_repeats_and_resumes(phases, tmp_path):
    dataset, labels = striped_data()
    settings = replace(SHORT, phases=phases, init_keys="random", query_regularizer=1e-4)

    def run(criterion, folder):
        adapter = tiny_adapter(query="block_k")
        train(adapter, dataset, labels, settings, criterion=criterion, checkpoints=folder, progress=False)
        return adapter

    whole = run(FailingLoss(), tmp_path / "whole")
    assert whole.phase == "group"
    with pytest.raises(PowerCut):
        run(FailingLoss(5), tmp_path / "killed")
    assert same(result_of(run(FailingLoss(), tmp_path / "killed")), result_of(whole))
    start = tiny_adapter(query="block_k")
    assert not torch.equal(start.shared.prompts, whole.shared.prompts)
    assert not torch.equal(start.pool.keys, whole.pool.keys)


def test_a_run_with_the_other_query_is_not_resumed(tmp_path):
    dataset, labels = striped_data()
    settings = replace(SHORT, shared=replace(PHASE, epochs=1), group=replace(PHASE, epochs=0))
    train(tiny_adapter(), dataset, labels, settings, checkpoints=tmp_path, progress=False)
    with pytest.raises(StateError, match="prompts.query is 'block_k' now and was 'final'"):
        train(tiny_adapter(query="block_k"), dataset, labels, settings, checkpoints=tmp_path, progress=False)


def test_training_removes_a_router(capsys):
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    adapter.phase = "group"
    adapter.fit_router(dataset.tensors[0], progress=False)
    settings = replace(SHORT, shared=replace(PHASE, epochs=0), group=replace(PHASE, epochs=1), init_keys="random")
    train(adapter, dataset, labels, settings)
    assert adapter.router is None
    assert "The router was removed, since training changes the queries" in capsys.readouterr().err
