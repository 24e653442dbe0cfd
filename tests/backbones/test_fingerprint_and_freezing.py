"""Description of a model, and its fingerprint against an independent hash."""

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
    """The hash of docs/explanation/prompt-file.md in numpy."""
    digests = []
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        head = name + "|" + ",".join(map(str, tensor.shape)) + "|"
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        digests.append(hashlib.sha256(head.encode() + np.ascontiguousarray(array).tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fingerprint_equals_the_documented_hash(dtype):
    tensors = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype), torch.zeros(0, 2).to(dtype), torch.arange(5)]
    assert fingerprint(tensors) == brute_force_fingerprint(tensors)
    assert fingerprint(reversed(tensors)) == fingerprint(tensors)
    assert fingerprint([tensors[0].T.contiguous().T, *tensors[1:]]) == fingerprint(tensors), "layout must not matter"


def test_fingerprint_covers_all_weights_but_the_head():
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


def test_arguments_of_models_without_a_record_of_timm():
    """Before timm 1.0.31: what the weights do not show."""
    options = {"img_size": 64, "depth": 1, "in_chans": 1, "global_pool": "avg", "dynamic_img_size": True}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    vars(vit).pop("_model_args", None)
    backbone = find_backbone(vit)
    expected = {"dynamic_img_size": True, "global_pool": "avg", "img_size": [64, 64], "in_chans": 1}
    assert backbone.info().model_args == expected
    assert backbone.preprocess()["input_size"] == [1, 64, 64]
    vit = timm.create_model("vit_base_patch16_siglip_224", depth=1)
    vars(vit).pop("_model_args", None)
    assert find_backbone(vit).info().model_args == {"img_size": [224, 224]}, "its pool has weights"


def test_preprocess_of_the_model():
    """The IN-21k ViT needs mean 0.5, not that of ImageNet; the size is that of this model."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    preprocess = find_backbone(vit).preprocess()
    assert preprocess["mean"] == preprocess["std"] == [0.5, 0.5, 0.5]
    assert preprocess["input_size"] == [3, 64, 64]
    config = resolve_model_data_config(vit)
    assert {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode")} == {
        key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")
    }
