"""The adapter against recorded numbers of the published modules, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lpt_peft import LongTailPromptAdapter

SCALE = 20.0


def golden_adapter(config, tensors):
    vit = VisionTransformer(
        **{key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")},
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).double()
    state = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    vit.load_state_dict(state)
    adapter = LongTailPromptAdapter.wrap(
        vit.eval(),
        config["num_classes"],
        **{key: config[key] for key in ("prompt_length", "pool_size", "top_k", "shared_layers")},
        query="final",
        logit_scale=SCALE,
    )
    trained = adapter.adapter_state_dict()
    trained["shared.prompts"] = tensors["shared_prompt"]
    trained["head.weight"] = tensors["head.weight"].T
    if "group_prompts" in tensors:
        trained["pool.prompts"] = tensors["group_prompts"]
        trained["pool.keys"] = tensors["group_keys"]
    adapter.load_adapter_state_dict(trained)
    return adapter


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_phase_1(golden, checkpointing):
    config, tensors = golden("phase1")
    adapter = golden_adapter(config, tensors)
    adapter.vit.set_grad_checkpointing(checkpointing)
    out = adapter(tensors["images"], return_output=True)
    close(out.features, tensors["features"])
    close(out.logits / SCALE, tensors["logits"])
    (out.logits / SCALE * tensors["probe"]).sum().backward()
    close(adapter.shared.prompts.grad, tensors["grad.shared_prompt"])
    close(adapter.head.weight.grad, tensors["grad.head.weight"].T)
    assert adapter.pool.prompts.grad is None
    assert all(p.grad is None for p in adapter.vit.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_phase_2(golden, checkpointing):
    config, tensors = golden("phase2")
    adapter = golden_adapter(config, tensors)
    adapter.vit.set_grad_checkpointing(checkpointing)
    adapter.phase = "group"
    out = adapter(tensors["images"], return_output=True)
    close(out.query, tensors["query"])
    # The published groups are unordered: compare them as sets, and the recorded sum of similarities.
    assert torch.equal(out.groups.sort(-1).values, tensors["top_k_indices"].sort(-1).values)
    matched = out.similarity.sum(-1).mean()
    close(matched, tensors["matched_similarity"])
    close(out.logits / SCALE, tensors["logits"])
    ((out.logits / SCALE * tensors["probe"]).sum() - 0.5 * matched).backward()
    close(adapter.pool.prompts.grad, tensors["grad.group_prompts"])
    close(adapter.pool.keys.grad, tensors["grad.group_keys"])
    close(adapter.head.weight.grad, tensors["grad.head.weight"].T)
    assert adapter.shared.prompts.grad is None
    assert all(p.grad is None for p in adapter.vit.parameters())
