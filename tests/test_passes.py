"""The block-K query: a single pass against the oracle, its state dicts and files, and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter, PromptConfig
from lpt_peft.backbones.base import masked_mean
from lpt_peft.checkpoint import encode, read_prompt_file
from lpt_peft.errors import ConfigError, InputError, StateError
from tests.backbones.models import images as images_of
from tests.backbones.models import make, wrap
from tests.backbones.transformers_zoo import encoder, inputs
from tests.conftest import tiny_vit
from tests.oracle import concatenated_prompts

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def one_pass_adapter(phase="group", *, query="block_k", seed=0, vit=None, shared_layers=1, **options):
    vit = tiny_vit(depth=3, **options) if vit is None else vit
    adapter = LongTailPromptAdapter.wrap(
        vit.double(), prompt_length=4, pool_size=6, top_k=2, shared_layers=shared_layers, query=query
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (adapter.shared.prompts, adapter.pool.prompts, adapter.pool.keys, adapter.head.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapter.eval()
    # Random keys would give all images the same groups: class tokens of a random ViT differ little.
    adapter.pool.init_keys(adapter.queries(torch.randn(24, 3, 32, 32, generator=generator, dtype=torch.float64)))
    adapter.phase = phase
    return adapter


def oracle(vit, images, trained, first, top_k, prefix):
    """The method in one pass by token concatenation: a first run gives the tokens that enter block `first`."""
    shared, groups, keys = (trained[name] for name in ("shared.prompts", "pool.prompts", "pool.keys"))
    seen = []
    with concatenated_prompts(vit.blocks, list(shared)):
        # Registered after the hook that appends the prompt, so it sees the prompt too.
        handle = vit.blocks[first].register_forward_pre_hook(
            lambda _, args: seen.append(args[0][:, : -shared.shape[1]])
        )
        vit.forward_features(images)
    handle.remove()
    tokens = seen[0]
    token = tokens[:, 0] if prefix else tokens.mean(1)
    centered = token - token.mean(-1, keepdim=True)
    query = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    cosines = torch.stack([torch.stack([torch.cosine_similarity(q, key, dim=0) for key in keys]) for q in query])
    picks = [sorted(range(len(keys)), key=lambda i, row=row: -float(row[i]))[:top_k] for row in cosines]
    prompts = list(shared[:first])
    for layer in range(first, len(shared)):
        own = torch.stack([sum(groups[i, layer - first] for i in pick) / top_k for pick in picks])
        prompts.append(torch.cat([shared[layer].expand(len(images), -1, -1), own], 1))
    with concatenated_prompts(vit.blocks, prompts):
        features = vit.forward_head(vit.forward_features(images), pre_logits=True)
    weight = trained["head.weight"]
    logits = 20 * (features / features.norm(dim=-1, keepdim=True)) @ (weight / weight.norm(dim=-1, keepdim=True)).T
    similarity = torch.stack([row[pick] for row, pick in zip(cosines, picks, strict=True)])
    return {
        "logits": logits,
        "features": features,
        "query": query,
        "similarity": similarity,
        "groups": torch.tensor(picks),
    }


@pytest.mark.parametrize("shared_layers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "patches"])
def test_one_pass_against_token_concatenation(options, shared_layers):
    adapter = one_pass_adapter(shared_layers=shared_layers, **options)
    trained = adapter.adapter_state_dict()
    with torch.no_grad():
        out = adapter(IMAGES, return_output=True)
        assert torch.equal(adapter.queries(IMAGES), out.query)
    expected = oracle(adapter.unwrap(), IMAGES, trained, shared_layers, 2, prefix=not options)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(out, name), tensor.detach(), rtol=0, atol=1e-12, msg=name)
    assert len({tuple(sorted(row)) for row in out.groups.tolist()}) > 1, "images must differ in their groups"


def test_every_block_runs_once_and_the_query_has_no_gradient():
    adapter = one_pass_adapter().train()
    calls = []
    for index, block in enumerate(adapter.vit.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: calls.append((index, out.requires_grad)))
    out = adapter(IMAGES, return_output=True)
    assert calls == [(0, False), (1, True), (2, True)]
    assert not out.query.requires_grad
    (out.logits.square().sum() + out.similarity.sum()).backward()
    got = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert got == {"pool.prompts", "pool.keys", "head.weight"}
    calls.clear()
    adapter.queries(IMAGES)
    assert calls == [(0, False)], "queries need the first K blocks alone"


def test_the_query_stays_without_gradient_where_the_shared_prompts_train():
    """As in phase "joint"."""
    adapter = one_pass_adapter().train()
    adapter.shared.requires_grad_(True)
    adapter(IMAGES, return_output=True).similarity.sum().backward()
    assert adapter.pool.keys.grad is not None
    assert adapter.shared.prompts.grad is None
    adapter(IMAGES).square().sum().backward()
    assert bool(adapter.shared.prompts.grad.flatten(1).any(1).all()), "features train the prompts of every block"


@pytest.mark.parametrize("query", ["final", "block_k"])
def test_the_queries_do_not_depend_on_the_phase(query):
    adapter = one_pass_adapter("shared", query=query)
    out = adapter(IMAGES, return_output=True)
    assert out.similarity.shape == out.groups.shape == (5, 0)
    assert out.query.requires_grad == (query == "final")
    torch.testing.assert_close(adapter.queries(IMAGES), out.query.detach(), rtol=0, atol=0)
    adapter.phase = "group"
    torch.testing.assert_close(adapter.queries(IMAGES), out.query.detach(), rtol=0, atol=0)
    assert not adapter.queries(IMAGES).requires_grad
    with adapter.disable_adapter(), pytest.raises(StateError, match=r"queries\(\) needs the prompts"):
        adapter.queries(IMAGES)


def test_padding_does_not_enter_the_query():
    row = "timm NaFlexViT"
    model = make(row)
    adapter = wrap(model, "block_k").double()
    pictures = images_of().double()
    patches = F.unfold(pictures, model.embeds.patch_size, stride=model.embeds.patch_size).transpose(1, 2)
    side = int(patches.shape[1] ** 0.5)
    # unfold gives (channel, row, column) per patch; NaFlex takes (row, column, channel).
    size = model.embeds.patch_size[0]
    patches = patches.unflatten(2, (3, size, size)).permute(0, 1, 3, 4, 2).flatten(2)
    coord = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    coord = coord.expand(len(patches), -1, -1)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    found = []
    for padding in (0, 3):
        batch = {
            "patches": F.pad(patches, (0, 0, 0, padding), value=9.0),
            "patch_coord": F.pad(coord, (0, 0, 0, padding)),
            "patch_valid": F.pad(valid, (0, padding)),
        }
        found.append(adapter.queries(batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=20, deadline=None)
def test_masked_mean(rows, tokens, data):
    values = torch.randn(rows, tokens, 3, dtype=torch.float64)
    valid = torch.tensor([[data.draw(st.booleans()) for _ in range(tokens)] for _ in range(rows)])
    found = masked_mean(values, valid)
    for row in range(rows):
        kept = [values[row, token] for token in range(tokens) if valid[row, token]]
        expected = sum(kept) / len(kept) if kept else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(found[row], expected)


def test_padding_of_transformers_does_not_enter_the_query():
    mask = "pixel_attention_mask"
    model = encoder("Siglip2Vision")
    adapter = LongTailPromptAdapter.wrap(model, 3, prompt_length=2, pool_size=3, query="block_k").eval()
    call = inputs("Siglip2Vision")
    call[mask] = torch.ones_like(call[mask])
    call[mask][:, -3:] = 0
    changed = {**call, "pixel_values": call["pixel_values"].clone()}
    changed["pixel_values"][:, -3:] += 5
    torch.testing.assert_close(adapter.queries(**changed), adapter.queries(**call), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(adapter.queries(**{**call, mask: torch.ones_like(call[mask])}), adapter.queries(**call))


# -- sizes and refusals -----------------------------------------------------------------------------------


def test_keys_have_the_width_of_the_blocks():
    config = PromptConfig(dim=16, depth=2, num_classes=3, feature_dim=20, query="block_k")
    assert config.key_dim == 16
    assert config.tensor_shapes["pool.keys"] == (20, 16)
    assert config.tensor_shapes["head.weight"] == (3, 20)
    assert PromptConfig.from_dict(config.to_dict()) == config
    assert PromptConfig(dim=16, depth=2, num_classes=3, feature_dim=20).key_dim == 20
    adapter = wrap(make("open_clip"), "block_k")  # width 48, features 20
    assert adapter.pool.keys.shape == (4, 48)
    assert adapter(images_of(), return_output=True).query.shape == (2, 48)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query": "block_K"}, r"query='block_K' must be \"final\" or \"block_k\""),
        ({"query": "block_k", "shared_layers": 0}, "shared_layers of at least 1.*same for all images"),
    ],
)
def test_refused_settings(arguments, words):
    with pytest.raises(ConfigError, match=words):
        LongTailPromptAdapter.wrap(tiny_vit(), **arguments)


@pytest.mark.parametrize("own", ["final", "block_k"])
def test_tensors_of_the_other_query_are_refused(own):
    other = {"final": "block_k", "block_k": "final"}[own]
    adapter, source = one_pass_adapter(query=own), one_pass_adapter(query=other, seed=1)
    before = {name: tensor.clone() for name, tensor in adapter.adapter_state_dict().items()}
    words = rf'for query="{other}", and this adapter has query="{own}".*load_prompts'
    with pytest.raises(InputError, match=words):
        adapter.load_adapter_state_dict(source.adapter_state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.adapter_state_dict().items())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=words):
            adapter.load_state_dict(source.state_dict(), strict=strict)
    same = one_pass_adapter(query=own, seed=2)
    for load in (
        lambda: adapter.load_adapter_state_dict(same.adapter_state_dict()),
        lambda: adapter.load_state_dict(same.state_dict()),
    ):
        load()
        assert torch.equal(adapter(IMAGES), same(IMAGES))


# -- prompt files -----------------------------------------------------------------------------------------


def test_the_file_states_the_query_only_where_it_is_not_the_default(tmp_path):
    for query in ("final", "block_k"):
        adapter = one_pass_adapter(query=query).float()
        adapter.save_pretrained(tmp_path / query)
        content = read_prompt_file(tmp_path / query)
        assert content.config.query == query
        assert encode(content).config["prompt"].get("query") == (None if query == "final" else "block_k")
        assert set(content.tensors) == {*adapter.prompt_config.tensor_shapes, "pool.usage"}
        loaded = LongTailPromptAdapter.from_pretrained(tmp_path / query, one_pass_adapter().float().unwrap())
        assert loaded.prompt_config == adapter.prompt_config
        assert torch.equal(loaded(IMAGES.float()), adapter(IMAGES.float()))
        loaded.save_pretrained(tmp_path / "again")
        again = (tmp_path / "again" / "prompts.safetensors").read_bytes()
        assert again == (tmp_path / query / "prompts.safetensors").read_bytes()


@pytest.mark.parametrize("own", ["final", "block_k"])
def test_load_prompts_takes_the_query_of_the_file(tmp_path, own):
    other = {"final": "block_k", "block_k": "final"}[own]
    source = one_pass_adapter(query=other, seed=1).float()
    source.save_pretrained(tmp_path)
    adapter = one_pass_adapter(query=own).float()
    adapter.load_prompts(tmp_path, part="shared")
    assert adapter.prompt_config.query == own, "shared prompts are the same for both"
    adapter.load_prompts(tmp_path)
    assert adapter.prompt_config.query == other
    assert torch.equal(adapter(IMAGES.float()), source(IMAGES.float()))
    assert adapter.state_dict().keys() == source.state_dict().keys()
    fresh = one_pass_adapter(query=other, seed=2).float()
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(fresh(IMAGES.float()), source(IMAGES.float()))


@pytest.mark.parametrize("query", ["final", "block_k"])
def test_mixtures_of_the_selected_groups_give_the_features_of_the_selection(query):
    adapter = one_pass_adapter(query=query)
    with torch.no_grad():
        out = adapter(IMAGES, return_output=True)
    size, k = adapter.prompt_config.pool_size, adapter.prompt_config.top_k
    selected = torch.zeros(len(IMAGES), size, dtype=IMAGES.dtype).scatter_(1, out.groups, 1 / k)
    found = adapter.mixture_features([selected, None, torch.eye(size)[0]], IMAGES)
    torch.testing.assert_close(found[0], out.features)
    adapter.phase = "shared"
    with torch.no_grad():
        torch.testing.assert_close(found[1], adapter.features(IMAGES))
    adapter.phase = "group"

    def first_group(pool, args, match):
        prompts = pool.prompts[:1].expand_as(match.prompts)
        return match._replace(prompts=prompts)

    handle = adapter.pool.register_forward_hook(first_group)
    with torch.no_grad():
        torch.testing.assert_close(found[2], adapter.features(IMAGES))
    handle.remove()
    assert not found.requires_grad


def test_mixtures_need_a_weight_for_each_group():
    adapter = one_pass_adapter()
    with pytest.raises(InputError, match="a weight for each group"):
        adapter.mixture_features([torch.ones(3)], IMAGES)
    with adapter.disable_adapter(), pytest.raises(StateError, match=r"mixture_features\(\) needs the prompts"):
        adapter.mixture_features([None], IMAGES)
