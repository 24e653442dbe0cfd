"""Routes of an adapter: exact, router, and a margin; state dicts and prompt files with a router."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft._numerics import cosine
from lpt_peft.checkpoint import encode, read_prompt_file
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.router import normalized_tokens, ridge, same_groups, selection_gap
from tests.backbones.models import images, make, rows, wrap
from tests.backbones.transformers_zoo import encoder, inputs
from tests.conftest import tiny_vit

TRAINING = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained_adapter(seed=0, dtype=torch.float32, **options):
    """An adapter whose images differ in their groups."""
    options = {"prompt_length": 4, "pool_size": 6, "top_k": 2, "shared_layers": 2, "query": "final", **options}
    adapter = LongTailPromptAdapter.wrap(tiny_vit(depth=4).to(dtype), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (adapter.shared.prompts, adapter.pool.prompts, adapter.head.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapter.eval()
    adapter.pool.init_keys(adapter.queries(TRAINING.to(dtype)))
    adapter.phase = "group"
    return adapter


def routed_adapter(**options):
    adapter = trained_adapter(**options)
    adapter.fit_router(TRAINING.to(adapter.dtype), progress=False)
    return adapter


def count_blocks(adapter):
    """Images that each block sees, in order."""
    seen = []
    for index, block in enumerate(adapter.vit.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.append((index, out.shape[0])))
    return seen


# -- fitting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_fit_is_ridge_regression_on_the_tokens_of_block_k(blocks):
    adapter = trained_adapter(dtype=torch.float64)
    pictures = TRAINING.double()
    tokens = []
    for index, block in enumerate(adapter.vit.blocks[:2]):
        if index >= 2 - blocks:
            block.register_forward_hook(lambda _, __, out: tokens.extend([out[:, 0], out[:, 1:].mean(1)]))
    with torch.no_grad():
        adapter.queries(pictures)
        features = normalized_tokens(tokens)
        expected = ridge(features, cosine(adapter.queries(pictures), adapter.pool.keys), 0.05)
    fit = adapter.fit_router(pictures, ridge=0.05, blocks=blocks, batch_size=17, progress=False)
    assert (fit.images, fit.penalty, adapter.router.layout.blocks) == (60, 0.05, blocks)
    torch.testing.assert_close(adapter.router.weight, expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(adapter.router.bias, expected[1], rtol=0, atol=1e-8)
    adapter.route = "router"
    out = adapter(pictures[:5], return_output=True)
    predicted = features[:5] @ expected[0].T + expected[1]
    similarity, groups = predicted.topk(2)
    torch.testing.assert_close(out.similarity, similarity, rtol=0, atol=1e-8)
    assert torch.equal(out.groups, groups)


def test_the_report_is_measured_on_held_out_images():
    adapter = trained_adapter(dtype=torch.float64)
    pictures, held = TRAINING.double(), torch.arange(60) % 5 == 4
    fit = adapter.fit_router(pictures, ridge=0.05, progress=False)
    other = trained_adapter(dtype=torch.float64)
    other.fit_router(pictures[~held], ridge=0.05, progress=False)
    other.route = "router"
    found = other(pictures[held], return_output=True).groups.sort(-1).values
    other.route = "exact"
    exact = other(pictures[held], return_output=True).groups.sort(-1).values
    same = (found == exact).all(-1)
    assert torch.equal(fit.same, same)
    assert fit.agreement == pytest.approx(float(same.double().mean()))
    assert fit.expected(0.0) == (0.0, pytest.approx(fit.agreement))
    assert fit.expected(float("inf")) == (1.0, 1.0)
    margin = float(fit.gaps.median())
    share, agreement = fit.expected(margin)
    assert share == pytest.approx(float((fit.gaps < margin).double().mean()))
    assert agreement == pytest.approx(float((same | (fit.gaps < margin)).double().mean()))


def test_the_penalty_is_chosen_on_held_out_images():
    adapter = trained_adapter()
    fit = adapter.fit_router(TRAINING, progress=False)
    errors = {}
    held = torch.arange(60) % 5 == 4
    for penalty in (fit.penalty / 10, fit.penalty, fit.penalty * 10):
        other = trained_adapter()
        other.fit_router(TRAINING[~held], ridge=penalty, progress=False)
        with torch.no_grad():
            exact = cosine(other.queries(TRAINING[held]), other.pool.keys)
            args, kwargs = other._inputs(TRAINING[held], (), {})
            _, tokens = other._blocks_and_tokens(other.shared(), args, kwargs, 1)
            errors[penalty] = float((other.router(normalized_tokens(tokens)) - exact).square().mean())
    assert min(errors, key=errors.__getitem__) == fit.penalty


@pytest.mark.parametrize("features", ["linear", "random"])
def test_kinds_of_batches(features):
    pictures = TRAINING.split(16)
    labels = torch.zeros(60, dtype=torch.int64).split(16)
    kinds: list = [
        TRAINING,
        list(pictures),
        iter(pictures),
        list(zip(pictures, labels, strict=True)),
        [[batch, label] for batch, label in zip(pictures, labels, strict=True)],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TRAINING, torch.cat(labels)), batch_size=16),
        [{"images": batch, "labels": label} for batch, label in zip(pictures, labels, strict=True)],
        [{"pixel_values": batch, "label": label} for batch, label in zip(pictures, labels, strict=True)],
    ]
    weights = []
    for batches in kinds:
        adapter = trained_adapter()
        adapter.fit_router(batches, ridge=0.1, features=features, width=8, batch_size=16, progress=False)
        weights.append(adapter.router.weight)
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=1e-3, atol=1e-5)
    assert weights[0].shape == (6, 48 + 8 * (features == "random"))


def test_fitting_leaves_mode_and_random_state():
    adapter = trained_adapter().train()
    before = torch.get_rng_state()
    adapter.fit_router(TRAINING, features="random", width=8, progress=False)
    assert adapter.training
    assert torch.equal(before, torch.get_rng_state())
    assert adapter.route == "exact"
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert adapter.pool.usage.sum() == 0


REFUSALS = {
    "images": ({"images": "photos/"}, InputError, "images is a str: pass a tensor"),
    "dataset": (
        {"images": [(torch.zeros(3, 32, 32), 1)]},
        InputError,
        r"A batch holds a Tensor of shape \(3, 32, 32\)",
    ),
    "strings": ({"images": [["a.png"]]}, InputError, "A batch holds a str in place of images"),
    "few": ({"images": TRAINING[:4]}, InputError, "got 4 images and needs at least 5"),
    "none": ({"images": []}, InputError, "got 0 images"),
    "features": ({"features": "cubic"}, ConfigError, "features='cubic'"),
    "ridge": ({"ridge": 0}, ConfigError, "ridge=0 must be above 0, or None"),
    "width": ({"features": "random", "width": 0}, ConfigError, "width=0 must be an integer from 1 to 16384"),
    "blocks": ({"blocks": 3}, ConfigError, "blocks=3 must be an integer from 1 to 2"),
    "seed": ({"seed": -1}, ConfigError, "seed=-1"),
    "batch_size": ({"batch_size": 0}, ConfigError, "batch_size=0"),
    "size": ({"images": torch.zeros(9, 3, 8, 8)}, InputError, "32"),
    "nan": ({"images": torch.full((9, 3, 32, 32), float("nan"))}, InputError, "NaN or infinite, so no router"),
    "held out nan": (
        {"images": torch.cat([torch.zeros(9, 3, 32, 32), torch.full((1, 3, 32, 32), float("inf"))])},
        InputError,
        "NaN or infinite, so no router",
    ),
}


@pytest.mark.parametrize(("options", "error", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refused_fits_change_nothing(options, error, words):
    adapter = routed_adapter().train()
    adapter.route = 0.1
    before = adapter.router
    with pytest.raises(error, match=words):
        adapter.fit_router(**{"images": TRAINING, **options})
    assert adapter.router is before
    assert adapter.route == 0.1
    assert adapter.training


def test_refused_adapters():
    adapter = trained_adapter()
    with pytest.raises(StateError, match=r"needs a router: call adapter\.fit_router"):
        adapter.route = "router"
    adapter.route = "exact"
    adapter.phase = "shared"
    with pytest.raises(StateError, match=r'phase is "shared", which does not use them\. Train phase "group"'):
        adapter.fit_router(TRAINING)
    one_pass = trained_adapter(query="block_k")
    for call in (lambda: one_pass.fit_router(TRAINING), lambda: setattr(one_pass, "route", 0.1)):
        with pytest.raises(ConfigError, match=r'query="block_k" needs no router'):
            call()
    shallow = LongTailPromptAdapter.wrap(tiny_vit(depth=2), placement="shallow", prompt_length=4)
    for call in (lambda: shallow.fit_router(TRAINING), lambda: setattr(shallow, "route", "router")):
        with pytest.raises(ConfigError, match=r'placement="shallow" has no groups, so it needs no router'):
            call()
    adapter = routed_adapter()
    for wrong in ("fast", -0.1, float("nan"), True, None):
        with pytest.raises(ConfigError, match=r'must be "exact", "router" or a margin'):
            adapter.route = wrong
    with adapter.disable_adapter(), pytest.raises(StateError, match=r"fit_router\(\) needs the prompts"):
        adapter.fit_router(TRAINING)


# -- routing ----------------------------------------------------------------------------------------------


def test_the_router_runs_every_block_once_and_the_margin_some_images_twice():
    adapter = routed_adapter(dtype=torch.float64)
    pictures = IMAGES.double()
    exact = adapter(pictures, return_output=True)
    adapter.route = "router"
    seen = count_blocks(adapter)
    routed = adapter(pictures, return_output=True)
    assert seen == [(0, 12), (1, 12), (2, 12), (3, 12)]
    assert routed.query.shape == (12, 0)
    with torch.no_grad():
        args, kwargs = adapter._inputs(pictures, (), {})
        _, tokens = adapter._blocks_and_tokens(adapter.shared(), args, kwargs, 1)
        predicted = adapter.router(normalized_tokens(tokens))
    gaps = selection_gap(predicted, 2)
    for rank in (0, 3, 11):
        margin = float(gaps.sort().values[rank]) + 1e-9
        adapter.route = margin
        seen.clear()
        out = adapter(pictures, return_output=True)
        assert seen == [(0, 12), (1, 12), (2, rank + 1), (3, rank + 1), (2, 12), (3, 12)]
        uncertain = gaps < margin
        assert int(uncertain.sum()) == rank + 1
        for row in range(12):
            expected = exact if uncertain[row] else routed
            torch.testing.assert_close(out.logits[row], expected.logits[row], rtol=0, atol=1e-10)
            torch.testing.assert_close(out.similarity[row], expected.similarity[row], rtol=0, atol=1e-10)
            assert torch.equal(out.groups[row], expected.groups[row])
    adapter.route = float("inf")
    torch.testing.assert_close(adapter(pictures), exact.logits, rtol=0, atol=1e-12)
    adapter.route = 0.0
    seen.clear()
    assert torch.equal(adapter(pictures), routed.logits)
    assert len(seen) == 4, "no image is below a margin of 0"


def test_all_groups_selected_needs_no_second_pass():
    adapter = routed_adapter(top_k=6)
    exact = adapter(IMAGES)
    adapter.route = 5.0
    seen = count_blocks(adapter)
    torch.testing.assert_close(adapter(IMAGES), exact, rtol=1e-4, atol=1e-4)
    assert len(seen) == 4


def test_images_do_not_affect_each_other():
    adapter = routed_adapter(dtype=torch.float64)
    pictures = IMAGES.double()
    for route in ("router", 0.02):
        adapter.route = route
        whole = adapter(pictures)
        for row in range(12):
            torch.testing.assert_close(adapter(pictures[row : row + 1])[0], whole[row], rtol=0, atol=1e-10)


def test_training_mode_and_phase_shared_are_exact():
    adapter = routed_adapter()
    adapter.route = "router"
    adapter.head_drop.p = 0.0
    adapter.train()
    out = adapter(IMAGES, return_output=True)
    assert out.query.shape == (12, 24)
    assert out.similarity.requires_grad
    adapter.eval()
    assert adapter.route == "router"
    adapter.phase = "shared"
    assert adapter(IMAGES, return_output=True).query.shape == (12, 24)


def test_masks_and_positions_belong_to_the_images_of_the_second_pass():
    """NaFlex and SigLIP 2: each image has its own mask."""
    model = encoder("Siglip2Vision")
    adapter = LongTailPromptAdapter.wrap(model, 3, prompt_length=2, pool_size=5, shared_layers=1, query="final")
    adapter.eval()
    batches = []
    for seed in range(6):
        torch.manual_seed(seed)
        call = inputs("Siglip2Vision", 4)
        call["pixel_values"] = torch.randn_like(call["pixel_values"])
        call["pixel_attention_mask"] = torch.ones_like(call["pixel_attention_mask"])
        for row in range(4):
            call["pixel_attention_mask"][row, -row - 1 :] = 0
        batches.append(call)
    queries = torch.cat([adapter.queries(**call) for call in batches])
    adapter.pool.init_keys(queries)
    adapter.phase = "group"
    adapter.fit_router(batches, progress=False)
    exact = adapter(**batches[0], return_output=True)
    adapter.route = "router"
    routed = adapter(**batches[0], return_output=True)
    with torch.no_grad():
        args, kwargs = adapter._inputs(None, (), dict(batches[0]))
        _, tokens = adapter._blocks_and_tokens(adapter.shared(), args, kwargs, 1)
        gaps = selection_gap(adapter.router(normalized_tokens(tokens)), 2)
    adapter.route = float(gaps.sort().values[1]) + 1e-9
    out = adapter(**batches[0], return_output=True)
    for row in range(4):
        expected = exact if gaps[row] < adapter.route else routed
        torch.testing.assert_close(out.logits[row], expected.logits[row], rtol=1e-7, atol=1e-9)


@rows
def test_every_ecosystem(row):
    adapter = wrap(make(row), "group")
    pictures = images(20)
    adapter.pool.init_keys(adapter.queries(pictures))
    exact = adapter(pictures)
    fit = adapter.fit_router(pictures, progress=False)
    assert fit.images == 20
    adapter.route = "router"
    routed = adapter(pictures, return_output=True)
    assert routed.logits.shape == (20, 5)
    adapter.route = float(fit.gaps.max()) + 10
    torch.testing.assert_close(adapter(pictures), exact, rtol=1e-4, atol=1e-4)
    adapter.route = float(routed.similarity.sort().values.std())
    assert adapter(pictures).isfinite().all()
    twin = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(twin(pictures), adapter(pictures))


@pytest.mark.slow
def test_compile_in_one_graph():
    adapter = routed_adapter()
    adapter.route = "router"
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-4)
    adapter.route = float(IMAGES.std()) * 0.01
    torch._dynamo.reset()
    broken = torch.compile(adapter, backend="aot_eager")
    torch.testing.assert_close(broken(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-4)


def test_export():
    adapter = routed_adapter()
    adapter.route = "router"
    program = torch.export.export(adapter, (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-4)


def test_autocast_and_bfloat16():
    adapter = routed_adapter()
    adapter.route = "router"
    expected = adapter(IMAGES, return_output=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = adapter(IMAGES, return_output=True)
    assert out.logits.dtype == out.similarity.dtype == torch.float32
    assert float((out.similarity - expected.similarity).abs().max()) < 0.1
    assert copy.deepcopy(adapter).double()(IMAGES.double()).dtype == torch.float64


# -- state ------------------------------------------------------------------------------------------------


def test_copies_keep_router_and_route():
    adapter = routed_adapter()
    adapter.route = 0.05
    expected = adapter(IMAGES)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.route == 0.05
        assert torch.equal(twin(IMAGES), expected)
        twin.router.weight.zero_()
    assert torch.equal(adapter(IMAGES), expected)
    adapter.unwrap()


@pytest.mark.parametrize("features", ["linear", "random"])
def test_state_dicts_hold_the_router(features):
    adapter = trained_adapter()
    adapter.fit_router(TRAINING, features=features, width=8, seed=3, progress=False)
    adapter.route = "router"
    state = adapter.state_dict()
    for twin in (trained_adapter(seed=1), routed_adapter(seed=1)):
        twin.load_state_dict(state)
        assert twin.router.layout == adapter.router.layout
        assert twin.route == "exact"
        twin.route = "router"
        assert torch.equal(twin(IMAGES), adapter(IMAGES))
    plain = trained_adapter(seed=2).state_dict()
    assert not any(name.startswith("router") for name in plain)
    with pytest.warns(UserWarning, match=r"router was removed: the state dict has prompts without a router\."):
        twin.load_state_dict(plain)
    assert twin.router is None
    assert twin.route == "exact"


DAMAGES = {
    "columns": {"weight": lambda value: value[:, :5]},
    "rows": {"weight": lambda value: value[1:], "bias": lambda value: value[1:]},
    "scalar": {"weight": lambda value: value.sum()},
    "bias": {"bias": lambda value: value[:1]},
    "no bias": {"bias": None},
    "no weight": {"weight": None},
    "no layout": {"layout_numbers": None},
    "width": {"layout_numbers": lambda value: torch.tensor([1, 10**9, 0])},
    "negative": {"layout_numbers": lambda value: torch.tensor([1, -8, 0])},
    "blocks": {"layout_numbers": lambda value: torch.tensor([40, 0, 0])},
    "seed": {"layout_numbers": lambda value: torch.tensor([1, 0, -1])},
    "short": {"layout_numbers": lambda value: value[:2]},
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("has_router", [True, False])
def test_a_router_that_does_not_fit_is_refused_in_a_state_dict(damages, has_router):
    state = routed_adapter().state_dict()
    for name, change in damages.items():
        value = state.pop(f"router.{name}")
        if change is not None:
            state[f"router.{name}"] = change(value)
    twin = routed_adapter(seed=1) if has_router else trained_adapter(seed=1)
    router = twin.router
    with pytest.raises(RuntimeError, match=r"router of the state dict does not fit .* call fit_router again"):
        twin.load_state_dict(state)
    assert twin.router is router


@pytest.mark.parametrize("options", [{}, {"features": "random", "width": 8, "seed": 5, "blocks": 2}])
def test_prompt_files_hold_the_router(tmp_path, options):
    adapter = trained_adapter()
    plain = encode(_content(adapter, tmp_path / "plain"))
    assert "router" not in plain.config
    adapter.fit_router(TRAINING, progress=False, **options)
    adapter.save_pretrained(tmp_path / "file")
    content = read_prompt_file(tmp_path / "file")
    expected = {"blocks": 1, "width": 0, "seed": 0} | {n: v for n, v in options.items() if n != "features"}
    assert encode(content).config["router"] == expected
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path / "file", trained_adapter(seed=3).unwrap())
    assert loaded.route == "exact"
    adapter.route = loaded.route = "router"
    assert torch.equal(loaded(IMAGES), adapter(IMAGES))
    loaded.save_pretrained(tmp_path / "again")
    first, again = ((tmp_path / name / "prompts.safetensors").read_bytes() for name in ("file", "again"))
    assert first == again
    other = trained_adapter(seed=4)
    other.load_prompts(tmp_path / "file")
    other.route = "router"
    assert torch.equal(other(IMAGES), adapter(IMAGES))
    with pytest.warns(UserWarning, match="router was removed: the prompts that were loaded have none"):
        other.load_prompts(tmp_path / "plain")
    assert other.router is None


def _content(adapter, folder):
    adapter.save_pretrained(folder)
    return read_prompt_file(folder)


def test_other_classes_keep_the_router_and_other_shared_prompts_remove_it(tmp_path):
    adapter = routed_adapter()
    names = [f"class {index}" for index in range(7)]
    adapter.save_pretrained(tmp_path, label_names=names)
    with pytest.warns(UserWarning, match="not trained yet: 'new'"):
        loaded = LongTailPromptAdapter.from_pretrained(
            tmp_path, trained_adapter(seed=3).unwrap(), label_names=[*names[:3], "new"]
        )
    loaded.route = adapter.route = "router"
    assert torch.equal(loaded.features(IMAGES), adapter.features(IMAGES))
    with pytest.warns(UserWarning, match="router was removed: it predicts queries under the shared prompts"):
        loaded.load_prompts(tmp_path, part="shared")
    assert loaded.router is None


def test_a_router_that_no_longer_fits_is_neither_used_nor_saved(tmp_path):
    adapter = routed_adapter()
    adapter.route = "router"
    adapter.train()
    adapter(IMAGES)
    adapter.eval()
    assert adapter.route == "router", "nothing was trained"
    adapter.train()
    with torch.no_grad():
        adapter.pool.keys.add_(0.1)
    with pytest.warns(UserWarning, match=r"changed since the router was fitted, so the route is exact again"):
        adapter.eval()
    assert adapter.route == "exact"
    with pytest.raises(StateError, match=r"changed since the router was fitted\. Call adapter\.fit_router"):
        adapter.route = "router"
    with pytest.warns(UserWarning, match="router is not written"):
        adapter.save_pretrained(tmp_path)
    assert read_prompt_file(tmp_path).router is None
    adapter.fit_router(TRAINING, progress=False)
    adapter.route = "router"
    adapter.phase = "shared"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapter(IMAGES).shape == (12, 7)


def test_the_router_can_be_removed():
    adapter = routed_adapter()
    exact = adapter(IMAGES)
    adapter.route = "router"
    adapter.router = None
    assert adapter.route == "exact"
    assert torch.equal(adapter(IMAGES), exact)


def test_agreement_is_better_than_chance():
    adapter = trained_adapter()
    exact = adapter(IMAGES, return_output=True).groups
    adapter.fit_router(TRAINING, progress=False)
    adapter.route = "router"
    routed = adapter(IMAGES, return_output=True).groups
    chosen = [torch.zeros(12, 6).scatter_(1, groups, 1.0) for groups in (exact, routed)]
    assert float(same_groups(*chosen, 2).float().mean()) > 2 / 15, "two of six groups at random agree in 1 of 15"
