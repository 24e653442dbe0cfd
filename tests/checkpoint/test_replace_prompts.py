"""`load_prompts`: other prompts for a wrapped ViT, all of them or only the shared prompts."""

from __future__ import annotations

import warnings

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import BackboneMismatchError, ConfigError, PromptFileError, StateError
from tests.checkpoint.adapters import IMAGES, encode_adapter, tiny_adapter
from tests.conftest import tiny_vit


def state_of(adapter):
    trained = {name: tensor.clone() for name, tensor in adapter.adapter_state_dict().items()}
    backbone = {name: tensor.clone() for name, tensor in adapter.vit.state_dict().items()}
    return trained, backbone, adapter.phase, adapter.prompt_config, adapter.metadata


def same(left, right):
    return left[2:] == right[2:] and all(
        first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        for first, second in zip(left[:2], right[:2], strict=True)
    )


OTHERS = {
    "same sizes": {},
    "other sizes": {"prompt_length": 2, "pool_size": 4, "top_k": 1, "shared_layers": 0, "logit_scale": 7.0},
    "other classes": {"num_classes": 3},
    "shared phase": {"phase": "shared"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_as_if_loaded_from_the_file(tmp_path, options):
    other = tiny_adapter(seed=2, **options)
    other.save_pretrained(tmp_path, training={"seed": 2})
    adapter = tiny_adapter(seed=1)
    vit, modules = adapter.vit, list(adapter.vit.modules())
    backbone = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    random = torch.get_rng_state()
    adapter.load_prompts(tmp_path)
    assert torch.equal(random, torch.get_rng_state())
    fresh = LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit())
    assert torch.equal(adapter(IMAGES), fresh(IMAGES))
    assert encode_adapter(adapter) == encode_adapter(fresh)
    assert [p.requires_grad for p in adapter.parameters()] == [p.requires_grad for p in fresh.parameters()]
    # The ViT is the same object with the same modules and tensors.
    assert adapter.vit is vit
    assert all(left is right for left, right in zip(modules, vit.modules(), strict=True))
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in vit.state_dict().items())
    assert adapter.unwrap() is vit


def test_another_number_of_classes_is_reported(tmp_path):
    tiny_adapter(seed=2, num_classes=3).save_pretrained(tmp_path)
    adapter = tiny_adapter()
    with pytest.warns(UserWarning, match=r"The head had 7 classes and was replaced .*, which has 3: ") as caught:
        adapter.load_prompts(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert tuple(adapter.head.weight.shape) == (3, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.load_prompts(tmp_path)  # 3 classes again
        tiny_adapter().load_prompts(tmp_path, part="shared")


def test_several_files_in_turn(tmp_path):
    adapters = {name: tiny_adapter(seed=seed, num_classes=seed) for name, seed in (("a", 3), ("b", 5))}
    expected = {name: adapter(IMAGES) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / name)
    adapter = tiny_adapter(seed=1)
    for name in "abaab":
        adapter.load_prompts(tmp_path / name)
        assert torch.equal(adapter(IMAGES), expected[name])


def test_modes_and_dtypes(tmp_path):
    other = tiny_adapter(seed=2)
    other.pool.bfloat16()
    other.save_pretrained(tmp_path)
    adapter = tiny_adapter(seed=1).train()
    adapter.load_prompts(tmp_path)
    assert adapter.pool.keys.dtype == torch.bfloat16
    assert adapter.head.weight.dtype == torch.float32
    assert all(module.training for module in (adapter, adapter.shared, adapter.pool, adapter.head))
    adapter(IMAGES).sum().backward()
    assert adapter.pool.keys.grad is None or adapter.pool.keys.grad.isfinite().all()
    assert adapter.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_the_shared_prompts_alone(tmp_path, phase):
    other = tiny_adapter(seed=2, phase=phase, num_classes=3, pool_size=9)
    other.save_pretrained(tmp_path, training={"seed": 2})
    adapter = tiny_adapter(seed=1)
    before = state_of(adapter)
    parameter = adapter.get_parameter("shared.prompts")
    adapter.load_prompts(tmp_path, part="shared")
    assert adapter.get_parameter("shared.prompts") is parameter
    assert torch.equal(parameter, other.get_parameter("shared.prompts"))
    with torch.no_grad():
        parameter.copy_(before[0]["shared.prompts"])
    assert same(before, state_of(adapter))
    assert not parameter.requires_grad  # still phase "group"


def refused(adapter, error, words, *args, **options):
    before, logits = state_of(adapter), adapter(IMAGES)
    with pytest.raises(error, match=words):
        adapter.load_prompts(*args, **options)
    assert same(before, state_of(adapter))
    assert torch.equal(adapter(IMAGES), logits)


def test_prompts_that_do_not_fit_change_nothing(tmp_path):
    adapter = tiny_adapter(seed=1)
    tiny_adapter(seed=2, prompt_length=2).save_pretrained(tmp_path / "shorter")
    refused(adapter, ConfigError, r"\(2, 2, 24\).*\(2, 3, 24\).*part=\"all\"", tmp_path / "shorter", part="shared")
    refused(adapter, ConfigError, 'part=\'pool\' must be "all" or "shared"', tmp_path / "shorter", part="pool")
    refused(adapter, ConfigError, "check_backbone='no'", tmp_path / "shorter", check_backbone="no")
    refused(adapter, PromptFileError, "does not exist", tmp_path / "nowhere")
    tiny_adapter(seed=2).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "prompts.safetensors").write_bytes(b"")
    refused(adapter, PromptFileError, "truncated: it has 0 bytes", tmp_path / "broken")
    tiny_adapter(seed=2, vit=tiny_vit(depth=3).eval()).save_pretrained(tmp_path / "deeper")
    refused(adapter, BackboneMismatchError, "another architecture", tmp_path / "deeper")
    refused(adapter, BackboneMismatchError, "3 blocks .* this ViT has 24, 2", tmp_path / "deeper", check_backbone="off")


def test_other_weights(tmp_path):
    vit = tiny_vit()
    with torch.no_grad():
        vit.norm.weight.add_(1)
    tiny_adapter(seed=2, vit=vit).save_pretrained(tmp_path)
    adapter = tiny_adapter(seed=1)
    refused(adapter, BackboneMismatchError, "other weights", tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        adapter.load_prompts(tmp_path, check_backbone="warn")
    adapter.load_prompts(tmp_path, check_backbone="off")
    assert torch.equal(adapter.head.weight, tiny_adapter(seed=2).head.weight)


def test_the_fingerprint_is_computed_once(tmp_path, monkeypatch):
    tiny_adapter(seed=2).save_pretrained(tmp_path)
    adapter = tiny_adapter(seed=1)
    adapter.load_prompts(tmp_path)
    monkeypatch.setattr("lpt_peft.backbones.weights.fingerprint", lambda tensors: pytest.fail("computed again"))
    monkeypatch.setattr("lpt_peft.checkpoint.match.fingerprint", lambda tensors: pytest.fail("computed again"))
    adapter.load_prompts(tmp_path)


def test_an_unwrapped_adapter_takes_no_prompts(tmp_path):
    adapter = tiny_adapter(seed=1)
    adapter.save_pretrained(tmp_path)
    adapter.unwrap()
    for check_backbone in ("error", "off"):
        with pytest.raises(StateError, match="unwrapped"):
            adapter.load_prompts(tmp_path, check_backbone=check_backbone)


def test_shared_prompts_too_large_for_the_adapters_dtype(tmp_path):
    large = tiny_adapter(seed=1)
    with torch.no_grad():
        large.shared.prompts.fill_(1e6)
    large.save_pretrained(tmp_path)
    adapter = tiny_adapter(seed=2)
    adapter.shared.half()
    before = adapter.shared.prompts.clone()
    with pytest.raises(ConfigError, match=r"too large for the adapter's torch\.float16"):
        adapter.load_prompts(tmp_path, part="shared")
    assert torch.equal(adapter.shared.prompts, before)
