"""SharedPrompt and PromptPool against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from lpt_peft import PoolMatch, PromptPool, SharedPrompt, decay_selected
from lpt_peft.errors import ConfigError, InputError, StateError


def brute_force(query, keys, prompts, top_k):
    """Select groups image by image, from the equations."""
    similarity, groups, means = [], [], []
    for row in query.double():
        cosines = [float(row @ key / (row.norm() * key.norm())) for key in keys.double()]
        best = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:top_k]
        groups.append(best)
        similarity.append([cosines[i] for i in best])
        means.append(torch.stack([prompts[i] for i in best]).double().mean(0))
    return torch.stack(means), torch.tensor(similarity, dtype=torch.float64), torch.tensor(groups)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    top_k=st.integers(1, 9),
    batch=st.integers(1, 7),
    key_dim=st.integers(2, 12),
    seed=st.integers(0, 2**31),
)
def test_matches_brute_force_and_images_are_independent(size, top_k, batch, key_dim, seed):
    top_k = min(top_k, size)
    generator = torch.Generator().manual_seed(seed)
    pool = PromptPool(size, layers=2, length=3, dim=5, top_k=top_k, key_dim=key_dim).double()
    query = torch.randn(batch, key_dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        pool.keys.copy_(torch.randn(pool.keys.shape, generator=generator, dtype=torch.float64))
    match = pool(query)
    assert isinstance(match, PoolMatch)
    means, similarity, groups = brute_force(query, pool.keys.detach(), pool.prompts.detach(), top_k)
    assert torch.equal(match.groups, groups)
    torch.testing.assert_close(match.similarity, similarity, rtol=0, atol=1e-12)
    torch.testing.assert_close(match.prompts, means, rtol=0, atol=1e-12)
    order = torch.randperm(batch, generator=generator)
    for i in order.tolist():
        single = pool(query[i : i + 1])
        assert torch.equal(single.groups[0], match.groups[i])
        torch.testing.assert_close(single.prompts[0], match.prompts[i], rtol=0, atol=1e-15)


def test_only_selected_groups_get_gradients():
    pool = PromptPool(6, layers=1, length=2, dim=4, top_k=2)
    match = pool(torch.randn(3, 4))
    ((1 - match.similarity).mean() + match.prompts.square().sum()).backward()
    selected = torch.zeros(6, dtype=torch.bool)
    selected[match.groups.flatten()] = True
    assert torch.equal(pool.keys.grad.ne(0).any(1), selected)
    assert torch.equal(pool.prompts.grad.flatten(1).ne(0).any(1), selected)


def test_match_term_pulls_selected_keys_to_the_query():
    pool = PromptPool(4, layers=1, length=1, dim=8, top_k=1)
    query = torch.randn(1, 8)
    before = pool(query)
    optimizer = torch.optim.SGD([pool.keys], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (1 - pool(query).similarity).mean().backward()
        optimizer.step()
    after = pool(query)
    assert torch.equal(after.groups, before.groups)
    assert after.similarity > before.similarity


def test_usage_is_counted_in_training_only():
    pool = PromptPool(5, layers=1, length=1, dim=4, top_k=2).eval()
    query = torch.randn(11, 4)
    pool(query)
    assert pool.usage.tolist() == [0] * 5
    pool.train()
    total = torch.zeros(5, dtype=torch.int64)
    for _ in range(2):
        total += torch.bincount(pool(query).groups.flatten(), minlength=5)
    assert torch.equal(pool.usage, total)
    assert pool.dead_groups() == [i for i in range(5) if total[i] == 0]
    assert pool.usage.dtype == torch.int64
    pool.half()
    assert pool.usage.dtype == torch.int64
    pool.reset_usage()
    assert pool.usage.sum() == 0
    with pytest.raises(StateError, match=r"usage .* unknown.*no image was counted.*train\(\) mode"):
        pool.dead_groups()


def test_low_precision_inputs_are_compared_in_float32():
    pool = PromptPool(8, layers=1, length=1, dim=16)
    query = torch.randn(5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        match = pool(query)
    expected = pool(query.float())
    assert match.similarity.dtype == torch.float32
    assert torch.equal(match.groups, expected.groups)
    assert torch.equal(match.similarity, expected.similarity)


def clusters(centers=5, each=30, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(centers, dim, generator=generator)
    points = means.repeat_interleave(each, 0) + 0.1 * torch.randn(centers * each, dim, generator=generator)
    return means, points * torch.empty(centers * each, 1).uniform_(
        0.5, 2, generator=generator
    )  # the norms do not matter


def test_init_keys_finds_clusters():
    means, points = clusters()
    pool = PromptPool(5, layers=1, length=1, dim=12, top_k=1)
    length = pool.keys.norm(dim=1).mean()
    pool.init_keys(points)
    similarity = nn.functional.cosine_similarity(pool.keys[:, None], means[None], dim=-1)
    assert (similarity.amax(0) > 0.99).all(), "every cluster has a key"
    torch.testing.assert_close(pool.keys.norm(dim=1), length.expand(5), rtol=1e-5, atol=0)
    pool(points)
    assert pool.dead_groups() == []


def test_init_keys_matches_scikit_learn():
    _, points = clusters(centers=9, each=20, dim=6, seed=3)
    unit = nn.functional.normalize(points, dim=1)
    pool = PromptPool(9, layers=1, length=1, dim=6)
    pool.init_keys(points)
    similarity = (unit @ nn.functional.normalize(pool.keys.detach(), dim=1).T).amax(1).mean()
    reference = KMeans(9, n_init=10, random_state=0).fit(unit.numpy()).cluster_centers_
    expected = (unit @ nn.functional.normalize(torch.from_numpy(reference).float(), dim=1).T).amax(1).mean()
    assert similarity > expected - 0.02


def test_init_keys_is_seeded_without_global_random_state():
    _, points = clusters()
    first, second, other_seed = (PromptPool(5, 1, 1, 12) for _ in range(3))
    with torch.no_grad():
        second.keys.copy_(first.keys)
        other_seed.keys.copy_(first.keys)
    state = torch.get_rng_state()
    first.init_keys(points, seed=4)
    second.init_keys(points, seed=4)
    other_seed.init_keys(points, seed=5)
    assert torch.equal(first.keys, second.keys)
    assert not torch.equal(first.keys, other_seed.keys)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 2, 30])
def test_init_keys_with_as_many_groups_as_queries(size):
    points = torch.randn(size, 6)
    pool = PromptPool(size, 1, 1, 6, top_k=1)
    pool.init_keys(points)
    similarity = nn.functional.cosine_similarity(pool.keys[:, None], points[None], dim=-1)
    torch.testing.assert_close(similarity.amax(0), torch.ones(size), rtol=0, atol=1e-5)


def test_init_keys_with_invalid_queries():
    pool = PromptPool(4, 1, 1, 6)
    before = pool.keys.detach().clone()
    with pytest.raises(InputError, match=r"shape \(N, 6\), not torch.float32 of shape \(3, 5\)"):
        pool.init_keys(torch.randn(3, 5))
    with pytest.raises(InputError, match="at least 4 distinct queries.*only 2 of 9"):
        pool.init_keys(torch.randn(2, 6)[[0, 1, 0, 1, 0, 1, 0, 1, 0]])
    with pytest.raises(InputError, match="NaN"):
        pool.init_keys(torch.full((9, 6), float("nan")))
    assert torch.equal(pool.keys, before)


def test_init_prompts_copies_prompts_to_all_groups():
    pool, prompts = PromptPool(4, layers=2, length=3, dim=5), torch.randn(2, 3, 5)
    pool.init_prompts(prompts)
    assert all(torch.equal(group, prompts) for group in pool.prompts)
    assert pool.prompts.requires_grad
    with pytest.raises(InputError, match=r"shape \(2, 3, 5\), .*not torch.float32 of shape \(3, 2, 5\)"):
        pool.init_prompts(prompts.transpose(0, 1))


def test_decay_selected():
    pool = PromptPool(6, layers=1, length=2, dim=4, top_k=1)
    match = pool(torch.randn(2, 4))
    match.prompts.sum().backward()
    plain = pool.prompts.grad.clone()
    decay_selected(pool.prompts, 0.5)
    decay_selected(pool.keys, 0.5)  # has no gradient, so nothing changes
    for group in range(6):
        extra = 0.5 * pool.prompts[group] if group in match.groups else torch.zeros_like(pool.prompts[group])
        torch.testing.assert_close(pool.prompts.grad[group], plain[group] + extra)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"size": 0}, "size=0 must be an integer of at least 1"),
        ({"length": 0}, "length=0"),
        ({"top_k": 5}, "top_k=5 groups cannot be selected from a pool of size=4"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"size": 2.5}, "size=2.5 must be an integer of at least 1"),
        ({"dim": "3"}, "dim='3' must be an integer"),
        ({"top_k": True}, "top_k=True must be an integer"),
        ({"layers": None}, "layers=None must be an integer"),
    ],
)
def test_invalid_sizes(sizes, words):
    with pytest.raises(ConfigError, match=words):
        PromptPool(**{"size": 4, "layers": 1, "length": 2, "dim": 3, **sizes})
    with pytest.raises(ConfigError, match="layers=0"):
        SharedPrompt(0, 1, 1)


def test_shared_prompt():
    shared = SharedPrompt(3, 5, 400)
    assert shared() is shared.prompts
    assert abs(float(shared.prompts.detach().std()) - 0.02) < 0.002
    assert "layers=3, length=5, dim=400" in repr(shared)
    assert "size=4" in repr(PromptPool(4, 1, 1, 2))


INVALID_QUERIES = {
    "width": (
        torch.zeros(3, 5),
        r"query must be .* shape \(B, 6\), not torch.float32 of shape \(3, 5\)",
    ),
    "one dimension": (torch.zeros(6), r"not torch.float32 of shape \(6,\): pass one feature per image"),
    "three dimensions": (torch.zeros(2, 3, 6), r"not torch.float32 of shape \(2, 3, 6\)"),
    "scalar": (torch.tensor(1.0), r"not torch.float32 of shape \(\)"),
    "integers": (torch.zeros(3, 6, dtype=torch.long), "not torch.int64 of shape"),
    "bool": (torch.zeros(3, 6, dtype=torch.bool), "not torch.bool of shape"),
    "complex": (torch.zeros(3, 6, dtype=torch.complex64), "not torch.complex64 of shape"),
    "array": (np.zeros((3, 6)), r"query must be a tensor \(B, 6\), not ndarray"),
    "output": (None, r"query must be a tensor \(B, 6\), not NoneType"),
    "device": (torch.zeros(3, 6, device="meta"), r"query is on meta, but must be on cpu: pass query\.to\('cpu'\)"),
}


@pytest.mark.parametrize("case", INVALID_QUERIES)
def test_invalid_queries(case):
    query, words = INVALID_QUERIES[case]
    pool = PromptPool(4, layers=1, length=2, dim=3, key_dim=6)
    with pytest.raises(InputError, match=words):
        pool(query)
    assert pool.usage.sum() == 0
    if case != "device":  # init_keys moves queries to the device of the keys
        with pytest.raises(InputError, match=words.replace("query", "queries").replace("(B, 6", "(N, 6")):
            pool.init_keys(query)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    pool = PromptPool(4, layers=1, length=2, dim=3, key_dim=6).train(training)
    match = pool(torch.zeros(0, 6))
    assert match.prompts.shape == (0, 1, 2, 3)
    assert match.similarity.shape == match.groups.shape == (0, 2)
    (match.prompts.sum() + match.similarity.sum()).backward()
    assert not pool.prompts.grad.any()
    assert pool.usage.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_query_and_pool(dtype):
    """All pairs of dtypes select the groups of the rounded values."""
    query = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for pool_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        pool = PromptPool(4, layers=1, length=2, dim=3, key_dim=6).to(pool_dtype)
        match = pool(query)
        _, similarity, groups = brute_force(query, pool.keys.detach(), pool.prompts.detach(), 2)
        assert match.prompts.dtype == dtype
        assert torch.equal(match.groups, groups)
        torch.testing.assert_close(match.similarity.double(), similarity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": "0"}, {"iterations": 1.5}])
def test_init_keys_with_invalid_options(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* must be an integer of at least 0"):
        PromptPool(4, 1, 1, 6).init_keys(torch.randn(9, 6), **options)


@pytest.mark.parametrize("prompts", [torch.zeros(2, 3, 5, dtype=torch.long), np.zeros((2, 3, 5)), None])
def test_init_prompts_of_another_type(prompts):
    with pytest.raises(InputError, match=r"prompts must be floating point of shape \(2, 3, 5\)"):
        PromptPool(4, layers=2, length=3, dim=5).init_prompts(prompts)
