"""The query regularizer in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lpt_peft.errors import ConfigError
from lpt_peft.losses import query_regularizer
from lpt_peft.recipe import train
from lpt_peft.recipe.training.criteria import add_query_regularizer
from tests.backbones.models import images, make, wrap
from tests.recipe.tiny import PHASE, SHORT, result_of, same, striped_data, tiny_adapter

LIMITED = replace(SHORT, shared=replace(PHASE, epochs=1), group=replace(PHASE, epochs=1))


def criterion(output, target, epoch):
    return output.logits.sum() + target.sum() + epoch


def test_the_term_is_added_in_phases_with_groups():
    adapter = tiny_adapter(query="block_k").train()
    batch, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    regularized = add_query_regularizer(criterion, replace(SHORT, query_regularizer=7.0), adapter)
    for phase, weight in (("shared", 0.0), ("group", 7.0)):
        adapter.phase = phase
        out = adapter(batch, return_output=True)
        expected = criterion(out, target, 3)
        if weight:
            expected = expected + weight * query_regularizer(out.query, out.features, adapter.pool.keys)
            assert float(expected) != float(criterion(out, target, 3))
        torch.testing.assert_close(regularized(out, target, 3), expected)
    assert add_query_regularizer(criterion, SHORT, adapter) is criterion


def test_a_run_trains_other_keys():
    dataset, labels = striped_data()
    results = {}
    for weight in (0.0, 0.0, 10.0):
        adapter = tiny_adapter(query="block_k")
        train(adapter, dataset, labels, replace(LIMITED, query_regularizer=weight), progress=False)
        assert weight not in results or same(results[weight], result_of(adapter))
        results[weight] = result_of(adapter)
    assert torch.equal(results[0.0]["shared.prompts"], results[10.0]["shared.prompts"])
    assert not torch.allclose(results[0.0]["pool.keys"], results[10.0]["pool.keys"], atol=1e-6)


def test_refusals():
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match=r"query_regularizer=0.5 needs an adapter with query=\"block_k\""):
        train(tiny_adapter(), dataset, labels, replace(LIMITED, query_regularizer=0.5), progress=False)
    with pytest.raises(ConfigError, match="query_regularizer=-1 must be at least 0"):
        replace(LIMITED, query_regularizer=-1)
    adapter = wrap(make("open_clip"), "block_k")
    assert adapter(images()).shape == (2, 5)
    with pytest.raises(ConfigError, match="queries of width 48 and features of width 20"):
        add_query_regularizer(criterion, replace(LIMITED, query_regularizer=0.5), adapter)
