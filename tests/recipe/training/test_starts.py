"""Starts of a run, against formulas on the images as the run reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft._kmeans import spherical_kmeans
from lpt_peft._random import derive_seed, preserve_random_state, seed_all
from lpt_peft.recipe import make_accelerator, progress, train
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.training import image_passes
from lpt_peft.recipe.training.phase_init import begin_phase
from tests.processes import run_ranks
from tests.recipe.tiny import (
    COUNTS,
    PHASE,
    SETTINGS,
    SHORT,
    FailingLoss,
    PowerCut,
    RandomlyScaled,
    striped_data,
    tiny_adapter,
)

ALL = {"init_prompts": "tokens", "init_head": "class_mean", "init_groups": "tokens"}
WIDE = torch.float64


def crops(dataset, purpose, indices=None, seed=0):
    """Images as a pass of the run reads them: random transforms seeded by run, purpose and image."""
    found = []
    with preserve_random_state():
        for index in range(len(dataset)) if indices is None else indices:
            seed_all(derive_seed(seed, purpose, "image", index))
            found.append(dataset[index][0])
    return torch.stack(found)


def started(settings, name, adapter=None, dataset=None, reporter=None):
    """An adapter at the beginning of a phase."""
    adapter = adapter or tiny_adapter(WIDE)
    dataset = dataset or RandomlyScaled(striped_data(dtype=WIDE)[0])
    reporter = reporter or Reporter(False, True)
    begin_phase(adapter, name, dataset, settings, accelerator=make_accelerator(settings), reporter=reporter)
    return adapter


def entering_tokens(adapter, images):
    """Tokens (L, B, N, d) of the plain model, from hooks."""
    seen, copy = [], tiny_adapter(WIDE).unwrap()
    handles = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in copy.blocks]
    with torch.no_grad():
        copy(images)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def drawn(tokens, seed):
    """A token of every image and block: (L, B, d)."""
    layers, count, length, _ = tokens.shape
    draws = torch.rand(count, layers, generator=torch.Generator().manual_seed(seed), dtype=WIDE)
    picked = [[tokens[layer, t, int(draws[t, layer] * length)] for t in range(count)] for layer in range(layers)]
    return torch.stack([torch.stack(row) for row in picked])


def unchanged(first, second, *names):
    return all(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in names)


@pytest.mark.parametrize("name", ["shared", "joint"])
@pytest.mark.parametrize("length", [2, 40])
def test_prompts_are_tokens_of_random_training_images(name, length):
    settings = replace(SETTINGS, init_prompts="tokens", init_keys="random", init_groups="random", seed=3)
    dataset = RandomlyScaled(striped_data(dtype=WIDE)[0])
    adapter = tiny_adapter(WIDE)
    if length != 2:
        adapter = type(adapter).wrap(adapter.unwrap(), 3, prompt_length=length, pool_size=4)
    keys = adapter.pool.keys.detach().clone()
    found = started(settings, name, adapter, dataset).shared.prompts.detach()
    order = torch.randperm(31, generator=torch.Generator().manual_seed(derive_seed(3, "token images"))).tolist()
    chosen = [order[position % 31] for position in range(length)]
    tokens = entering_tokens(adapter, crops(dataset, "prompts", chosen, seed=3))
    torch.testing.assert_close(found, drawn(tokens, derive_seed(3, "prompts")), rtol=0, atol=1e-12)
    assert torch.equal(adapter.pool.keys, keys)


@pytest.mark.parametrize("query", ["final", "block_k"])
def test_groups_start_as_tokens_of_the_images_nearest_to_their_keys(query):
    settings = replace(SETTINGS, init_groups="tokens", seed=2)
    dataset = RandomlyScaled(striped_data(dtype=WIDE)[0])
    reference = tiny_adapter(WIDE, query=query).eval()
    adapter = started(settings, "group", tiny_adapter(WIDE, query=query), dataset)
    images = crops(dataset, "queries", seed=2)
    with torch.no_grad():
        queries = torch.nn.functional.normalize(reference(images, return_output=True).query, dim=-1)
    centers = spherical_kmeans(queries, 4, torch.Generator().manual_seed(2), 50)
    norm = reference.pool.keys.detach().norm(dim=-1).mean()
    torch.testing.assert_close(adapter.pool.keys.detach(), centers * norm, rtol=0, atol=1e-12)
    nearest = (centers @ queries.T).sort(dim=-1, descending=True).indices[:, :2]
    tokens = drawn(entering_tokens(adapter, images[nearest.flatten()]), derive_seed(2, "groups"))
    for group in range(4):
        expected = tokens[1:, 2 * group : 2 * group + 2]  # block 1 has no group prompts
        torch.testing.assert_close(adapter.pool.prompts[group].detach(), expected, rtol=0, atol=1e-12)
    assert unchanged(adapter, reference, "shared.prompts", "head.weight")
    assert adapter.phase == "group"


def test_joint_training_starts_from_keys_and_groups_of_the_untrained_adapter():
    joint = started(replace(SETTINGS, phases="joint", **ALL), "joint")
    apart = started(replace(SETTINGS, **ALL, init_keys="random"), "shared")
    started(replace(SETTINGS, **ALL), "group", apart)
    assert unchanged(joint, apart, "shared.prompts", "pool.keys", "pool.prompts")
    assert joint.phase == "group"
    assert joint.shared.prompts.requires_grad


@pytest.mark.parametrize("name", ["shared", "joint", "group"])
def test_the_head_starts_from_class_means_of_the_model_as_it_enters_the_first_phase(name):
    shared = replace(PHASE, epochs=0) if name == "group" else PHASE
    settings = replace(SETTINGS, phases="joint" if name == "joint" else "decoupled", shared=shared, **ALL)
    dataset, labels = striped_data(dtype=WIDE)
    reference = started(replace(settings, init_head="random"), name)
    adapter = started(settings, name)
    assert unchanged(adapter, reference, "shared.prompts", "pool.keys", "pool.prompts")
    with torch.no_grad():
        features = reference.eval().features(crops(RandomlyScaled(dataset), "class means"))
    norm = reference.head.weight.detach().norm(dim=-1).mean()
    assert abs(norm - 1) < 1e-6
    for label in range(3):
        mean = features[torch.tensor(labels) == label].mean(0)
        row = adapter.head.weight[label].detach()
        torch.testing.assert_close(row, norm * mean / mean.norm(), rtol=0, atol=1e-12, msg=str(label))
    assert adapter.pool.usage.sum() == 0


def test_the_head_of_the_second_phase_is_that_of_the_first():
    settings = replace(SETTINGS, **ALL)
    adapter = tiny_adapter(WIDE)
    before = adapter.head.weight.detach().clone()
    started(settings, "group", adapter)
    assert torch.equal(adapter.head.weight, before)


def test_classes_without_an_image_keep_their_class_vectors_and_are_named(capsys):
    dataset, _ = striped_data(dtype=WIDE)
    adapter = type(tiny_adapter()).wrap(tiny_adapter(WIDE).unwrap(), 16, prompt_length=2, pool_size=4)
    before = adapter.head.weight.detach().clone()
    started(replace(SETTINGS, init_head="class_mean"), "shared", adapter, dataset, Reporter(True, True))
    assert torch.equal(adapter.head.weight[3:], before[3:])
    assert not torch.isclose(adapter.head.weight[:3], before[:3]).all(1).any()
    assert (
        "warning: 13 of 16 classes have no training image and keep their class vectors instead of class means: "
        "3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ...\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("length", [2, 20])
def test_a_group_with_too_few_images_repeats_them(length):
    images = torch.randn(6, 3, 32, 32, dtype=WIDE)
    dataset = TensorDataset(images, torch.tensor([0, 0, 1, 1, 2, 2]))
    adapter = type(tiny_adapter()).wrap(tiny_adapter(WIDE).unwrap(), 3, prompt_length=length, pool_size=4)
    started(replace(SETTINGS, init_groups="tokens"), "group", adapter, dataset)
    tokens = entering_tokens(adapter, images)[1].flatten(0, 1)
    prompts = adapter.pool.prompts.detach().flatten(0, 2)
    assert (torch.cdist(prompts, tokens).amin(1) < 1e-6).all()


def test_starts_use_no_global_random_state_and_depend_on_the_seed():
    state = torch.get_rng_state()
    first, second = (started(replace(SETTINGS, phases="joint", **ALL), "joint") for _ in range(2))
    names = ["shared.prompts", "pool.keys", "pool.prompts", "head.weight"]
    assert unchanged(first, second, *names)
    assert torch.equal(torch.get_rng_state(), state)
    other = started(replace(SETTINGS, phases="joint", **ALL, seed=1), "joint")
    assert not any(unchanged(first, other, name) for name in names)


def test_only_evenly_spaced_images_start_groups(monkeypatch):
    monkeypatch.setattr(image_passes, "MAX_QUERIES", 16)
    dataset, _ = striped_data(dtype=WIDE)
    adapter = started(replace(SETTINGS, init_groups="tokens"), "group", dataset=dataset)
    tokens = entering_tokens(adapter, dataset.tensors[0][::2])[1].flatten(0, 1)
    prompts = adapter.pool.prompts.detach().flatten(0, 2)
    assert (torch.cdist(prompts, tokens).amin(1) < 1e-6).all()


def run(folder=None, criterion=None, **changes):
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    settings = replace(SHORT, **ALL, **changes)
    options = {"criterion": criterion, "progress": False, "checkpoints": folder}
    history = train(adapter, RandomlyScaled(dataset), labels, settings, **options)
    return history, adapter


@pytest.mark.parametrize("phases", ["decoupled", "joint"])
def test_an_interrupted_run_with_all_starts_resumes_exactly(tmp_path, phases, monkeypatch):
    expected, reference = run(criterion=FailingLoss(), phases=phases)
    with pytest.raises(PowerCut):
        run(tmp_path, FailingLoss(5), phases=phases)
    original, passes = image_passes.ImagePasses.batches, []

    def batches(self, indices, purpose):
        passes.append(purpose)
        return original(self, indices, purpose)

    monkeypatch.setattr(image_passes.ImagePasses, "batches", batches)
    history, adapter = run(tmp_path, FailingLoss(), phases=phases)
    assert history == expected
    assert unchanged(adapter, reference, "shared.prompts", "pool.keys", "pool.prompts", "head.weight")
    # Phase "shared" (or "joint") is not initialized again.
    assert passes == (["queries", "queries"] if phases == "decoupled" else [])


def starts_of_all_processes():
    settings = replace(SETTINGS, phases="joint", **ALL)
    adapter = started(settings, "joint")
    return {name: value.detach().clone() for name, value in adapter.adapter_state_dict().items()}


def test_two_processes_start_as_a_single_process_does():
    expected = starts_of_all_processes()
    first, second = run_ranks(starts_of_all_processes, init=False)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12, msg=name)


def test_long_passes_show_their_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL", -1.0)
    settings = replace(SETTINGS, **ALL)
    started(settings, "shared", reporter=Reporter("stripes", True))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "stripes: prompts: batch 0/1",
        "stripes: class means: batch 0/2",
        "stripes: class means: batch 1/2",
    ]
    started(settings, "group", reporter=Reporter(False, True))
    assert not capsys.readouterr().err
    monkeypatch.setattr(progress, "has_bar", lambda: True)
    started(settings, "group", reporter=Reporter("stripes", True))
    assert "stripes: queries" in capsys.readouterr().err


def test_training_from_all_starts_learns():
    _, adapter = run(init_keys="kmeans")
    dataset, labels = striped_data(1)
    with torch.no_grad():
        found = adapter(dataset.tensors[0]).argmax(1)
    assert (found == torch.tensor(labels)).float().mean() > 0.6
    assert sum(COUNTS) == 31
