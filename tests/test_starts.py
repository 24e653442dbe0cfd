"""Token starts: tokens that enter the blocks of the plain ViT, seen by hooks on an unwrapped copy of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.starts import block_inputs, nearest_images
from tests.backbones.models import images, make, rows, wrap
from tests.conftest import tiny_vit

SIDE = 32


def pictures(count, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny(n=4, dtype=torch.float64, **options):
    return LongTailPromptAdapter.wrap(tiny_vit().to(dtype), 3, prompt_length=n, pool_size=4, **options)


def inputs_of_blocks(model, blocks, *args):
    """The first argument of every block in the model's own forward, batch first."""
    seen = []

    def hook(block, given, kwargs):
        seen.append((given[0] if given else kwargs["hidden_states"]).detach().clone())

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    return seen


def oracle(seen, count, seed):
    """Token of image t in block l: row floor(u[t, l] * N), with u drawn image after image."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, len(seen), generator=generator, dtype=torch.float64)
    return torch.stack(
        [
            torch.stack([tokens[t, int(draws[t, layer] * tokens.shape[1])] for t in range(count)])
            for layer, tokens in enumerate(seen)
        ]
    )


@rows
def test_tokens_that_enter_the_blocks_of_every_backbone(row):
    plain, adapter = make(row).double(), wrap(make(row).double())
    x = images(3).double()
    tower = getattr(plain, "visual", plain)
    prefix = "visual." if tower is not plain else ""
    names = dict.fromkeys(adapter.backbone.blocks)
    positions = {module: name for name, module in adapter.vit.named_modules() if module in names}
    blocks = [plain.get_submodule(positions[block]) for block in adapter.backbone.blocks]
    assert all(name.startswith(prefix) for name in positions.values())
    seen = inputs_of_blocks(plain.vit if hasattr(plain, "vit") else tower, blocks, x)
    transposed = seen[0].shape[0] != 3
    seen = [tokens.transpose(0, 1) if transposed else tokens for tokens in seen]
    with torch.no_grad():
        for found, expected in zip(block_inputs(adapter.backbone, x), seen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    adapter.init_prompts([x[:2], x[2:]], seed=5)
    torch.testing.assert_close(adapter.shared.prompts.detach(), oracle(seen, 3, 5), rtol=1e-12, atol=1e-12)
    assert adapter.shared.prompts.requires_grad


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    length=st.integers(1, 6),
    seed=st.integers(0, 9),
    labelled=st.sampled_from(["images", "tuple", "dict"]),
)
def test_tokens_do_not_depend_on_the_batches(sizes, length, seed, labelled):
    adapter, total = ADAPTER, sum(sizes)
    x = pictures(total, seed).double()
    wrapped = {
        "images": lambda part: part,
        "tuple": lambda part: [part, torch.zeros(len(part))],
        "dict": lambda part: {"pixel_values": part, "labels": torch.zeros(len(part))},
    }[labelled]
    batches = [wrapped(part) for part in x.split(sizes)]
    if total < length:
        with pytest.raises(
            InputError, match=f"{length} tokens per block need {length} images.*hold {total}: pass more"
        ):
            adapter.sample_tokens(batches, length, seed=seed)
        return
    found = adapter.sample_tokens(batches, length, seed=seed)
    expected = oracle(inputs_of_blocks(VIT, VIT.blocks, x), length, seed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.sample_tokens(x, length, seed=seed), expected, rtol=0, atol=1e-12)


VIT = tiny_vit().double()
ADAPTER = LongTailPromptAdapter.wrap(copy.deepcopy(VIT), 3, prompt_length=4, pool_size=4)


def test_no_more_images_are_read_than_needed_and_random_state_and_modes_are_kept():
    adapter = tiny()
    adapter.train()
    adapter.vit.blocks[1].eval()
    modes = {name: module.training for name, module in adapter.named_modules()}
    usage, state, read = adapter.pool.usage.clone(), torch.get_rng_state(), []

    def batches():
        for seed in range(9):
            read.append(seed)
            yield pictures(3, seed).double()

    before = adapter.pool.prompts.detach().clone()
    adapter.init_prompts(batches(), seed=1)
    assert read == [0, 1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(adapter.pool.usage, usage)
    assert torch.equal(adapter.pool.prompts, before)
    assert {name: module.training for name, module in adapter.named_modules()} == modes
    first = adapter.shared.prompts.detach().clone()
    adapter.init_prompts(batches(), seed=1)
    assert torch.equal(adapter.shared.prompts, first)
    adapter.init_prompts(batches(), seed=2)
    assert not torch.equal(adapter.shared.prompts, first)


def test_tokens_are_those_of_the_model_without_prompts_whatever_the_phase():
    adapter = tiny()
    expected = adapter.sample_tokens(pictures(4).double(), 4)
    with torch.no_grad():
        adapter.shared.prompts.mul_(50)
    adapter.phase = "group"
    assert torch.equal(adapter.sample_tokens(pictures(4).double(), 4), expected)
    assert adapter.phase == "group"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_backbones_and_autocast_give_float32_prompts(dtype):
    exact = tiny(dtype=torch.float32)
    expected = exact.sample_tokens(pictures(4), 4)
    cast = tiny(dtype=torch.float32)
    cast.cast_backbone(dtype)
    found = cast.sample_tokens(pictures(4), 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    cast.init_prompts(pictures(4))
    assert cast.shared.prompts.dtype == torch.float32
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            found = exact.sample_tokens(pictures(4), 4)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_copy_and_a_parametrized_prompt_take_tokens():
    adapter = tiny()
    twin = copy.deepcopy(adapter)
    adapter.init_prompts(pictures(4).double())
    twin.init_prompts(pictures(4).double())
    assert torch.equal(adapter.shared.prompts, twin.shared.prompts)
    nn.utils.parametrize.register_parametrization(twin.shared, "prompts", Doubled())
    twin.init_prompts(pictures(4, seed=3).double())
    adapter.init_prompts(pictures(4, seed=3).double())
    torch.testing.assert_close(twin.shared.prompts, adapter.shared.prompts)


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


def test_errors_of_token_starts():
    adapter = tiny()
    before = adapter.shared.prompts.detach().clone()
    with pytest.raises(InputError, match="4 tokens per block need 4 images, a token of each, and the batches hold 3"):
        adapter.init_prompts(pictures(3).double())
    with pytest.raises(InputError, match="NaN or infinite: check the images"):
        adapter.init_prompts(pictures(4).double() * float("nan"))
    with pytest.raises(InputError, match="Images are uint8; they must be floating point"):
        adapter.init_prompts(torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8))
    for wrong in (None, 3, "images", {"pixel_values": pictures(4)}):
        with pytest.raises(InputError, match=r"pass a tensor \(N, 3, H, W\), or an iterable of batches"):
            adapter.init_prompts(wrong)
    with pytest.raises(ConfigError, match="count=0 must be an integer of at least 1"):
        adapter.sample_tokens(pictures(1), 0)
    with pytest.raises(ConfigError, match="seed=-1"):
        adapter.init_prompts(pictures(4), seed=-1)
    with adapter.disable_adapter(), pytest.raises(StateError, match=r"outside disable_adapter\(\)"):
        adapter.init_prompts(pictures(4).double())
    assert torch.equal(adapter.shared.prompts, before)
    with pytest.raises(
        InputError, match=r"shape \(2, 4, 24\), \(layers, n, d\), not torch.float64 of shape \(4, 2, 24\)"
    ):
        adapter.shared.init_prompts(before.transpose(0, 1))
    adapter.unwrap()
    with pytest.raises(StateError, match="unwrapped"):
        adapter.init_prompts(pictures(4).double())


def test_padded_patches_of_naflex_are_read_from_a_mapping():
    adapter = wrap(make("timm NaFlexViT"))
    patches = torch.randn(3, 16, 8 * 8 * 3)
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
    batch = {
        "patches": patches,
        "patch_coord": grid.expand(3, -1, -1),
        "patch_valid": torch.ones(3, 16, dtype=torch.bool),
    }
    adapter.init_prompts([batch])
    tokens = list(block_inputs(adapter.backbone, batch))
    for layer, prompt in enumerate(adapter.shared.prompts.detach()):
        assert (tokens[layer].detach()[:, :, None] == prompt).all(-1).any(1).any(0).all()


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_nearest_images_sorts_by_cosine(groups, size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (size, groups))
    found = nearest_images(queries, keys, count)
    assert found.shape == (groups, count)
    for key, chosen in zip(keys, found.tolist(), strict=True):
        similarity = [float(q @ key / q.norm() / key.norm()) for q in queries]
        ranking = sorted(range(size), key=lambda index: -similarity[index])
        assert chosen == (ranking * count)[:count]


def test_errors_of_nearest_images():
    with pytest.raises(InputError, match="at least 1 query"):
        nearest_images(torch.zeros(0, 5), torch.zeros(2, 5), 1)
    with pytest.raises(InputError, match=r"queries must be .* shape \(N, 5\)"):
        nearest_images(torch.zeros(3, 4), torch.zeros(2, 5), 1)
    with pytest.raises(InputError, match="keys must be floating point"):
        nearest_images(torch.zeros(3, 5), torch.zeros(5), 1)
    with pytest.raises(ConfigError, match="count=0"):
        nearest_images(torch.zeros(3, 5), torch.zeros(2, 5), 0)


def test_groups_take_separate_prompts():
    adapter = tiny()
    prompts = torch.randn_like(adapter.pool.prompts)
    adapter.pool.init_prompts(prompts)
    assert torch.equal(adapter.pool.prompts, prompts)
    with pytest.raises(InputError, match=r"\(m, layers, n, d\), not torch.float64 of shape \(3,"):
        adapter.pool.init_prompts(prompts[:3])
