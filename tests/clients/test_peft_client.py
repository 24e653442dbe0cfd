"""LoRA and prompts on the same ViT: trained, saved and merged together."""

from __future__ import annotations

import pytest
import timm
import torch

peft = pytest.importorskip("peft")

from lpt_peft import LongTailPromptAdapter  # noqa: E402

phases = pytest.mark.parametrize("phase", ["shared", "group"])
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_lora(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "fc1"], r=2))


def wrap(model, phase):
    adapter = LongTailPromptAdapter.wrap(model, 5, prompt_length=2, pool_size=4, head_dropout=0.0)
    adapter.phase = phase
    return adapter


def trained(phase):
    """LoRA and prompts after a few steps of one optimizer."""
    torch.manual_seed(9)
    adapter = wrap(with_lora(vit()), phase).train()
    lora = [parameter for name, parameter in adapter.vit.named_parameters() if "lora_" in name]
    for parameter in lora:  # wrap froze the ViT
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(adapter.trainable_parameters(), lr=0.05)
    start = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
    for _ in range(5):
        loss = adapter(IMAGES, labels=torch.tensor([0, 3, 4])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = optimizer.param_groups[0]["params"]
    assert len(moved) == len(lora) + (2 if phase == "shared" else 3)
    assert not any(torch.equal(*pair) for pair in zip(start, moved, strict=True))
    return adapter.eval()


@phases
def test_lora_and_prompts_saved_and_loaded_in_two_files(phase, tmp_path):
    """PEFT saves a LoRA folder, the adapter a prompt file."""
    adapter = trained(phase)
    adapter.vit.save_pretrained(str(tmp_path / "lora"))
    adapter.save_pretrained(tmp_path / "prompts")
    loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "lora"))
    again = LongTailPromptAdapter.from_pretrained(tmp_path / "prompts", loaded).eval()
    assert again.phase == phase
    torch.testing.assert_close(again(IMAGES), adapter(IMAGES))
    plain = LongTailPromptAdapter.wrap(vit(), 5, prompt_length=2, pool_size=4)
    plain.load_adapter_state_dict(adapter.adapter_state_dict())
    plain.phase = phase
    assert not torch.allclose(plain(IMAGES), adapter(IMAGES), atol=1e-2), "without LoRA it is another model"


@phases
def test_lora_and_prompts_in_one_state_dict(phase):
    """`backbone_in_state_dict=False` keeps trainable parameters of the ViT."""
    adapter = trained(phase)
    adapter.backbone_in_state_dict = False
    state = adapter.state_dict()
    own = {"shared.prompts", "pool.prompts", "pool.keys", "pool.usage", "head.weight", "phase_index", "block_k_query"}
    assert {name for name in state if "lora_" not in name} == own
    assert sum("lora_" in name for name in state) == 8
    again = wrap(with_lora(vit()), "shared").eval()
    again.backbone_in_state_dict = False
    for name, parameter in again.vit.named_parameters():
        parameter.requires_grad_("lora_" in name)
    again.load_state_dict(state)
    assert again.phase == phase
    torch.testing.assert_close(again(IMAGES), adapter(IMAGES))


@phases
@pytest.mark.parametrize("after", ["wrap", "unwrap"])
def test_merge_and_unload(phase, after, tmp_path):
    """LoRA can be merged inside the adapter, or after unwrap, before the prompts are loaded on the merged ViT."""
    adapter = trained(phase)
    expected = adapter(IMAGES)
    prompts = adapter.adapter_state_dict()
    if after == "wrap":
        merged = adapter.vit.merge_and_unload()
        torch.testing.assert_close(adapter(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert not any("lora_" in name for name, _ in merged.named_parameters())
        return
    merged = adapter.unwrap().merge_and_unload()
    again = wrap(merged, phase).eval()
    again.load_adapter_state_dict(prompts)
    torch.testing.assert_close(again(IMAGES), expected, rtol=1e-4, atol=1e-4)


@phases
def test_disable_adapter_of_both_libraries(phase):
    """That of PEFT keeps the prompts, that of the adapter keeps LoRA."""
    adapter = trained(phase)
    plain = vit()
    with torch.no_grad():
        with adapter.disable_adapter(), adapter.vit.disable_adapter():
            torch.testing.assert_close(adapter(IMAGES), plain(IMAGES))
        with adapter.disable_adapter():
            only_lora = adapter(IMAGES)
        assert not torch.allclose(only_lora, plain(IMAGES), atol=1e-2)
        with adapter.vit.disable_adapter():
            only_prompts = adapter(IMAGES)
    other = wrap(plain, phase)
    other.load_adapter_state_dict(adapter.adapter_state_dict())
    torch.testing.assert_close(only_prompts, other.eval()(IMAGES))
