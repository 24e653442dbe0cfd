"""Finding the driver, what it tells of a model, and the fingerprint against a brute-force hash."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from tests.conftest import tiny_vit


def brute_force_fingerprint(tensors):
    """From the description in docs/explanation/prompt-file.md, by numpy."""
    digests = []
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        head = name + "|" + ",".join(map(str, tensor.shape)) + "|"
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        digests.append(hashlib.sha256(head.encode() + np.ascontiguousarray(array).tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fingerprint_is_what_the_docs_say(dtype):
    tensors = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype), torch.zeros(0, 2).to(dtype), torch.arange(5)]
    assert fingerprint(tensors) == brute_force_fingerprint(tensors)
    assert fingerprint(reversed(tensors)) == fingerprint(tensors)
    assert fingerprint([tensors[0].T.contiguous().T, *tensors[1:]]) == fingerprint(tensors), "layout must not matter"


def test_fingerprint_ignores_wrapping_and_head_but_no_weight():
    vit = tiny_vit()
    plain = fingerprint(find_backbone(vit).frozen_tensors())
    adapter = LongTailPromptAdapter.wrap(vit)
    assert adapter.fingerprint == plain
    with torch.no_grad():
        vit.head.weight.add_(1)
    assert fingerprint(find_backbone(vit).frozen_tensors()) == plain
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias[3] += 1e-3
    assert fingerprint(find_backbone(vit).frozen_tensors()) != plain
    assert adapter.fingerprint == fingerprint(find_backbone(vit).frozen_tensors()), "what the backbone is now"


def test_info_of_a_timm_model():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    info = find_backbone(vit).info()
    assert (info.library, info.library_version) == ("timm", timm.__version__)
    assert info.architecture == "vit_tiny_patch16_224"
    assert info.hub_id == vit.pretrained_cfg["hf_hub_id"]
    read_off = {"global_pool": "token", "img_size": [64, 64]}  # before timm 1.0.31, which records the arguments
    assert info.model_args == ({"depth": 2, "img_size": 64} if hasattr(vit, "_model_args") else read_off)
    assert (info.embed_dim, info.depth, info.num_heads) == (192, 2, 3)
    assert info.num_parameters == sum(p.numel() for n, p in vit.named_parameters() if not n.startswith("head."))
    assert find_backbone(tiny_vit()).info().architecture == "VisionTransformer"


def test_arguments_are_read_off_a_model_that_timm_recorded_none_of():
    """Before timm 1.0.31; all that `from_pretrained` cannot see from the weights."""
    options = {"img_size": 64, "depth": 1, "in_chans": 1, "global_pool": "avg", "dynamic_img_size": True}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    vars(vit).pop("_model_args", None)
    backbone = find_backbone(vit)
    wanted = {"dynamic_img_size": True, "global_pool": "avg", "img_size": [64, 64], "in_chans": 1}
    assert backbone.info().model_args == wanted
    assert backbone.preprocess()["input_size"] == [1, 64, 64]
    vit = timm.create_model("vit_base_patch16_siglip_224", depth=1)
    vars(vit).pop("_model_args", None)
    assert find_backbone(vit).info().model_args == {"img_size": [224, 224]}, "its pool has weights"


def test_preprocess_is_the_models_own():
    """Trap 15: the IN-21k ViT wants mean 0.5, not ImageNet's; the size is that of this very model."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    preprocess = find_backbone(vit).preprocess()
    assert preprocess["mean"] == preprocess["std"] == [0.5, 0.5, 0.5]
    assert preprocess["input_size"] == [3, 64, 64]
    config = resolve_model_data_config(vit)
    assert {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode")} == {
        key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")
    }
