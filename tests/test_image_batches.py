"""Batches of images: each layout gives the arguments of a call that the model takes."""

from __future__ import annotations

import collections

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft._image_batches import read_batch
from lpt_peft.errors import InputError
from tests.backbones.models import images, make, rows, wrap
from tests.backbones.transformers_zoo import encoder, inputs

CPU = torch.device("cpu")
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "batch",
    [
        PICTURES,
        (PICTURES,),
        [PICTURES, LABELS],
        (PICTURES, LABELS, ["a.png", "b.png"]),
        {"pixel_values": PICTURES},
        {"pixel_values": PICTURES, "labels": LABELS},
        {"label": LABELS, "pixel_values": PICTURES},
        collections.UserDict({"pixel_values": PICTURES, "labels": LABELS}),  # as transformers' BatchFeature
        ({"pixel_values": PICTURES}, LABELS),
    ],
    ids=str,
)
def test_layouts(batch):
    found, kwargs = read_batch(batch, CPU)
    if found is None:
        assert list(kwargs) == ["pixel_values"]
        found = kwargs["pixel_values"]
    else:
        assert kwargs == {}
    assert torch.equal(found, PICTURES)


def test_other_arguments_are_kept_and_all_tensors_are_moved():
    meta = torch.device("meta")
    mapping = {"pixel_values": PICTURES, "mask": MASK, "labels": LABELS, "interpolate_pos_encoding": True}
    found, kwargs = read_batch(mapping, meta)
    assert found is None
    assert sorted(kwargs) == ["interpolate_pos_encoding", "mask", "pixel_values"]
    assert kwargs["interpolate_pos_encoding"] is True
    assert kwargs["mask"].device == kwargs["pixel_values"].device == meta
    patches = {"patches": torch.zeros(2, 4, 12), "patch_valid": MASK}
    found, kwargs = read_batch((patches, LABELS), meta)
    assert kwargs == {}
    assert {name: (value.shape, value.device) for name, value in found.items()} == {
        "patches": ((2, 4, 12), meta),
        "patch_valid": ((2, 4), meta),
    }
    assert read_batch((PICTURES, LABELS), meta)[0].device == meta


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (PICTURES[0], r"A batch holds a Tensor of shape \(3, 8, 8\) in place of images .* give batches"),
        ((PICTURES[0], 1), r"A batch holds a Tensor of shape \(3, 8, 8\)"),
        (["a.png", "b.png"], "A batch holds a str in place of images"),
        ([], "A batch holds a list in place of images"),
        (None, "A batch holds a NoneType in place of images"),
        ({}, r"A batch has the keys \(none\) and no images: give .* under the key \"pixel_values\""),
        ({"path": ["a.png"], "labels": LABELS}, "keys path, labels and no images"),
        ({"pixel_values": [PICTURES[0]]}, "keys pixel_values and no images"),
    ],
    ids=str,
)
def test_refused_batches(batch, words):
    with pytest.raises(InputError, match=words):
        read_batch(batch, CPU)


@rows
def test_pixel_values_of_every_ecosystem(row):
    """`fit_router`, `init_prompts`, `queries` and `features` read them as `forward` does."""
    adapter, pictures = wrap(make(row), "group"), images(20)
    adapter.pool.init_keys(adapter.queries(pictures))
    for compute in (adapter.queries, adapter.features):
        assert torch.equal(compute(pixel_values=pictures), compute(pictures))
    with pytest.raises(InputError, match="images and pixel_values= are the same argument"):
        adapter.features(pictures, pixel_values=pictures)
    batches = [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in pictures.split(8)]
    weights, prompts = [], []
    for layout in (pictures, batches):
        adapter.init_prompts(layout)
        prompts.append(adapter.shared.prompts.detach().clone())
        adapter.fit_router(layout, ridge=0.1, batch_size=8, progress=False)
        weights.append(adapter.router.weight)
    assert torch.equal(*prompts)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_tokens_of_masked_images_are_those_of_the_model_with_its_mask():
    adapter = LongTailPromptAdapter.wrap(encoder("Siglip2Vision"), 3, prompt_length=4, pool_size=5)
    batch = inputs("Siglip2Vision", 4)
    without = {**batch, "pixel_attention_mask": torch.ones_like(batch["pixel_attention_mask"])}
    found = adapter.sample_tokens([{**batch, "labels": LABELS}], 4, seed=3)
    entering = []
    for block in adapter.vit.encoder.layers:
        block.register_forward_pre_hook(lambda _, args: entering.append(args[0].detach()))
    with adapter.disable_adapter(), torch.no_grad():
        adapter(**batch)
    draws = torch.rand(4, len(entering), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for layer, tokens in enumerate(entering):
        for image in range(4):
            expected = tokens[image, int(draws[image, layer] * tokens.shape[1])]
            torch.testing.assert_close(found[layer, image], expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(adapter.sample_tokens([without], 4, seed=3), found)
