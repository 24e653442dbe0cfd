"""VPT-Shallow: `placement="shallow"` against token concatenation written out, and everything around it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lpt_peft import LongTailPromptAdapter, PromptConfig
from lpt_peft.checkpoint import check_writable
from lpt_peft.errors import ConfigError, InputError, LPTError, PromptFileFormatError, StateError
from lpt_peft.recipe import train
from tests.backbones.models import ROWS, images, make, rows
from tests.conftest import tiny_vit
from tests.recipe.tiny import PHASE, SETTINGS, striped_data


def shallow(row="timm ViT", dtype=torch.float64, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        options = {"prompt_length": 3, "head_dropout": 0.0, **options}
        adapter = LongTailPromptAdapter.wrap(make(row).to(dtype), 5, placement="shallow", **options)
        with torch.no_grad():
            adapter.shared.prompts.mul_(20)
    return adapter


def x(batch=2, seed=0, dtype=torch.float64):
    return images(batch, seed).to(dtype)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def logits_of(feature, adapter):
    return 20 * F.normalize(feature, dim=-1) @ F.normalize(adapter.head.weight, dim=-1).T


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"pool_size": 5}, "pool_size"),
        ({"pool_size": 5, "top_k": 3, "shared_layers": 0}, "pool_size, top_k, shared_layers"),
    ],
)
def test_sizes_of_groups_are_named_once(sizes, named):
    with pytest.warns(UserWarning, match=f'^{named}: no effect, because placement="shallow" has no groups') as found:
        adapter = shallow(**sizes)
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(adapter)
        shallow(pool_size=20, top_k=2, shared_layers=1)  # the defaults
        LongTailPromptAdapter.wrap(make("timm ViT"), 5, query="final", **sizes)  # has groups


def test_timm_against_concatenation():
    adapter, vit = shallow(), make("timm ViT").double()
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x())))
    tokens = torch.cat([tokens, adapter.shared.prompts.expand(2, -1, -1)], 1)
    for block in vit.blocks:
        tokens = block(tokens)
    expected = logits_of(vit.forward_head(vit.norm(tokens[:, :-3]), pre_logits=True), adapter)
    close(adapter(x()), expected)
    [found] = torch.autograd.grad(adapter(x()).square().sum(), adapter.shared.prompts)
    [reference] = torch.autograd.grad(expected.square().sum(), adapter.shared.prompts)
    close(found, reference, 1e-11)


def test_torchvision_against_concatenation():
    adapter, vit = shallow("torchvision"), make("torchvision").double()
    patches = vit._process_input(x())
    tokens = torch.cat([vit.class_token.expand(2, -1, -1), patches], 1) + vit.encoder.pos_embedding
    tokens = torch.cat([tokens, adapter.shared.prompts.expand(2, -1, -1)], 1)
    tokens = vit.encoder.layers(tokens)
    close(adapter(x()), logits_of(vit.encoder.ln(tokens)[:, 0], adapter))


@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_against_concatenation(batch_first):
    clip = make("open_clip").double()
    adapter = shallow("open_clip")
    for model in (clip, adapter.vit):
        model.visual.transformer.batch_first = batch_first
        for block in model.visual.transformer.resblocks:
            block.attn.batch_first = batch_first
    tower = clip.visual
    tokens = torch.cat([tower._embeds(x()), adapter.shared.prompts.expand(2, -1, -1)], 1)
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    for block in tower.transformer.resblocks:
        tokens = block(tokens)
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    pooled, _ = tower._pool(tokens[:, :-3])
    close(adapter(x()), logits_of(pooled @ tower.proj, adapter))


def test_the_mask_of_a_vit_does_not_hide_the_prompt():
    adapter, vit = shallow(), make("timm ViT").double()
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x())))
    tokens = torch.cat([tokens, adapter.shared.prompts.expand(2, -1, -1)], 1)
    extended = torch.ones(20, 20, dtype=torch.bool)
    extended[:17, :17] = mask
    for block in vit.blocks:
        tokens = block(tokens, attn_mask=extended)
    expected = logits_of(vit.forward_head(vit.norm(tokens[:, :-3]), pre_logits=True), adapter)
    close(adapter(x(), attn_mask=mask), expected)
    assert not torch.allclose(adapter(x()), expected, atol=1e-3)


def test_padding_of_naflex_does_not_change_the_output():
    adapter = shallow("timm NaFlexViT")
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(2, 9, 8 * 8 * 3, dtype=torch.float64, generator=generator)
    coordinates = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1).reshape(1, 9, 2)
    batch = {
        "patches": patches,
        "patch_coord": coordinates.expand(2, -1, -1),
        "patch_valid": torch.ones(2, 9, dtype=torch.bool),
    }
    padded = {
        "patches": torch.cat([patches, patches[:, :4]], 1),
        "patch_coord": F.pad(batch["patch_coord"], (0, 0, 0, 4)),
        "patch_valid": F.pad(batch["patch_valid"], (0, 4)),
    }
    close(adapter(padded), adapter(batch), 1e-5)  # NaFlexViT computes positions in float32


@rows
def test_every_backbone_trains_restores_and_checkpoints(row):
    adapter, plain = shallow(row), make(row).double()
    assert adapter.shared.prompts.shape == (1, 3, adapter.prompt_config.dim)
    assert adapter.pool is None
    assert [name for name, _ in adapter.named_parameters() if not name.startswith("vit.")] == [
        "shared.prompts",
        "head.weight",
    ]
    output = adapter.train()(x(), return_output=True)
    assert output.groups.shape == output.similarity.shape == (2, 0)
    output.logits.square().sum().backward()
    expected = adapter.shared.prompts.grad.clone()
    assert expected.abs().max() > 1e-6
    if (enable := ROWS[row].checkpointing) is not None:
        enable(adapter.vit)
        adapter.zero_grad()
        adapter(x()).square().sum().backward()
        close(adapter.shared.prompts.grad, expected, 1e-10)
    adapter.eval()
    logits = adapter(x())
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(twin(x()), logits)
    with adapter.disable_adapter(), torch.no_grad():
        own = adapter.vit.eval()(x()) if not hasattr(adapter.vit, "encode_image") else None
    restored = adapter.unwrap()
    assert [type(m) for m in restored.modules()] == [type(m) for m in plain.modules()]
    if own is not None and isinstance(own, torch.Tensor):
        close(own, plain(x()), 1e-10)


@pytest.mark.parametrize(
    "row", ["timm ViT", "timm EVA-02", "timm BEiT", "transformers DINOv3", "torchvision", "open_clip"]
)
def test_compiled_and_exported_and_in_threads(row):
    adapter = shallow(row, torch.float32).eval()
    batch = x(2, dtype=torch.float32)
    expected = adapter(batch)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    close(compiled(batch), expected, 1e-5)
    program = torch.export.export(adapter, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = x(3, seed=1, dtype=torch.float32)
    close(program.module()(more), adapter(more), 1e-5)
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        batches = [x(2, seed, torch.float32) for seed in range(8)]
        found = list(pool.map(adapter, batches))
    for logits, batch in zip(found, batches, strict=True):
        close(logits, adapter(batch), 1e-5)


@pytest.mark.parametrize("row", ["timm ViT", "transformers ViT classifier"])
def test_a_compiled_and_checkpointed_training_step(row):
    adapter = shallow(row, torch.float32).train()
    ROWS[row].checkpointing(adapter.vit)
    adapter(x(dtype=torch.float32)).square().sum().backward()
    expected = adapter.shared.prompts.grad.clone()
    adapter.zero_grad()
    torch.compile(adapter, backend="aot_eager")(x(dtype=torch.float32)).square().sum().backward()
    close(adapter.shared.prompts.grad, expected, 1e-3)


@rows
def test_autocast_and_a_cast_backbone(row):
    exact = shallow(row, torch.float32).eval()(x(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        adapter = shallow(row, torch.float32).eval()
        logits = adapter(x(dtype=torch.float32))
        logits.sum().backward()
    assert logits.dtype == torch.float32
    assert adapter.shared.prompts.grad.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.1, atol=1.5)
    adapter.cast_backbone(torch.bfloat16)
    torch.testing.assert_close(adapter(x(dtype=torch.float32)), exact, rtol=0.1, atol=1.5)


def test_a_prompt_file_keeps_the_placement(tmp_path):
    adapter = shallow(dtype=torch.float32).eval()
    adapter.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["prompt"]["placement"] == "shallow"
    assert sorted(written["tensors"]) == ["head.weight", "shared.prompts"]
    assert written["tensors"]["shared.prompts"]["shape"] == [1, 3, 48]
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, make("timm ViT"))
    assert loaded.prompt_config == adapter.prompt_config
    assert loaded.pool is None
    assert torch.equal(loaded(images()), adapter(images()))
    deep = LongTailPromptAdapter.wrap(make("timm ViT"), 5, prompt_length=3)
    before = deep(images())
    state = {name: tensor.clone() for name, tensor in deep.state_dict().items()}
    deep_folder = tmp_path / "deep"
    deep.save_pretrained(deep_folder)
    assert "placement" not in json.loads((deep_folder / "config.json").read_text())["prompt"]
    deep.phase = "group"
    deep.load_prompts(tmp_path)
    assert deep.pool is None
    assert (deep.phase, deep.training) == ("shared", False)
    assert torch.equal(deep(images()), adapter(images()))
    deep.load_prompts(deep_folder)
    assert torch.equal(deep(images()), before)
    deep.phase = "group"
    assert deep(images(), return_output=True).groups.shape == (2, 2)
    with pytest.raises(ConfigError, match=r"shared prompts are \(1, 3, 48\) .*adapter's \(2, 3, 48\)"):
        deep.load_prompts(tmp_path, part="shared")
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded.load_state_dict(state, strict=False)
    check_writable(adapter.prompt_config)


def test_state_dicts_of_a_shallow_adapter():
    adapter, other = shallow(), shallow()
    with torch.no_grad():
        adapter.shared.prompts.add_(1)
    assert sorted(adapter.adapter_state_dict()) == ["head.weight", "shared.prompts"]
    other.load_adapter_state_dict(adapter.adapter_state_dict())
    assert torch.equal(other(x()), adapter(x()))
    other = shallow()
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other(x()), adapter(x()))
    with pytest.raises(InputError, match="unknown .*pool.keys"):
        other.load_adapter_state_dict({**adapter.adapter_state_dict(), "pool.keys": torch.zeros(20, 48)})
    with pytest.raises(RuntimeError, match='phase_index=1 .*placement="shallow" has none'):
        other.load_state_dict({**adapter.state_dict(), "phase_index": torch.tensor(1)})


def test_a_file_with_groups_in_a_shallow_prompt_is_refused(tmp_path):
    from lpt_peft.checkpoint.schema import check_config  # noqa: PLC0415 - the rule under test

    shallow(dtype=torch.float32).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(PromptFileFormatError, match='prompt.phase is "group", and prompt.placement "shallow"'):
        check_config({**written, "prompt": {**written["prompt"], "phase": "group"}})
    with pytest.raises(PromptFileFormatError, match="placement"):
        check_config({**written, "prompt": {**written["prompt"], "placement": "middle"}})
    usage = {"pool.usage": {"dtype": "I64", "shape": [20]}}
    with pytest.raises(LPTError, match="pool.usage"):
        check_config({**written, "tensors": {**written["tensors"], **usage}})


def test_groups_are_refused():
    adapter = shallow()
    with pytest.raises(ConfigError, match='phase="group" needs groups, and placement="shallow" has none'):
        adapter.phase = "group"
    assert adapter.phase == "shared"
    with pytest.raises(StateError, match='placement="shallow" has none: use features'):
        adapter.queries(x())
    with pytest.raises(ConfigError, match='query="block_k" selects groups, and placement="shallow" has no groups'):
        PromptConfig(dim=8, depth=2, num_classes=3, placement="shallow", query="block_k")
    with pytest.raises(ConfigError, match='placement=\'middle\' must be "deep" or "shallow"'):
        LongTailPromptAdapter.wrap(tiny_vit(), 3, placement="middle")
    dataset, labels = striped_data()
    small = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, placement="shallow")
    with pytest.raises(ConfigError, match=r'placement="shallow" has no groups.*phases="shared"'):
        train(small, dataset, labels, SETTINGS, progress=False)


def test_training_a_shallow_prompt_with_all_starts(tmp_path):
    dataset, labels = striped_data()
    settings = replace(SETTINGS, group=replace(PHASE, epochs=0), init_prompts="tokens", init_head="class_mean")
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, placement="shallow")
    before = adapter.shared.prompts.detach().clone()
    history = train(adapter, dataset, labels, settings, checkpoints=tmp_path, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert not torch.equal(adapter.shared.prompts, before)
    again = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, placement="shallow")
    train(again, dataset, labels, settings, checkpoints=tmp_path, progress=False)
    assert torch.equal(again.shared.prompts, adapter.shared.prompts)
    deep = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2)
    with pytest.raises(StateError, match="placement"):
        train(deep, dataset, labels, settings, checkpoints=tmp_path, progress=False)


def test_token_starts_are_those_of_block_1():
    adapter = shallow()
    adapter.init_prompts(x(3), seed=2)
    tokens = adapter.sample_tokens(x(3), 3, seed=2)
    assert torch.equal(adapter.shared.prompts.detach(), tokens[:1])


def test_parameter_counts():
    config = PromptConfig(dim=768, depth=12, num_classes=365, placement="shallow")
    assert config.num_prompt_parameters == 10 * 768
    assert PromptConfig.from_dict(config.to_dict()) == config
    assert config.layout == "10 tokens appended before block 1, through all 12 blocks; no groups"
