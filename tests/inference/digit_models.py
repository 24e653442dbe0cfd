"""Models whose classes, groups and head come from images of digits, without training. No tests here."""

from __future__ import annotations

from dataclasses import replace

import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.data.digits import DigitsLT
from lpt_peft.heads import class_sums
from lpt_peft.vit_classifier import ViTClassifier

NAMES = ("zéro", "one", "two", "三", "four", "five", "six", "seven", "eight", "nine")


def small_vit():
    """The first two blocks of the bundled ViT, which export quickly."""
    vit = glyph_vit()
    vit.blocks = vit.blocks[:2]
    vit._model_args["depth"] = 2
    return vit


def digits(split="test", count=60):
    """Images (count, 3, 32, 32) and labels (count,), evenly spaced over the split."""
    data = DigitsLT(split)
    rows = [round(row) for row in torch.linspace(0, len(data) - 1, count).tolist()]
    images, labels = zip(*(data[row] for row in rows), strict=True)
    return torch.stack(images), torch.tensor(labels)


def fit_head(model, classes, temperature):
    """Set the head to class means, with one class fewer than ten for `classes=9` and so on."""
    images, labels = digits("train", 120)
    with torch.no_grad():
        features = model.features(images)
    model.head.init_class_means(class_sums(features, labels % classes, classes))
    model.metadata = replace(model.metadata, label_names=NAMES[:classes], temperature=temperature)


def digit_adapter(
    phase, query="final", *, seed=0, classes=10, pool_size=8, temperature=0.7, build=small_vit, **options
):
    """An adapter of a ViT, by default the small ViT, whose groups differ, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build()
        sizes = {"prompt_length": 3, "pool_size": pool_size, "logit_scale": 20.0 + seed}
        if options.get("placement") == "shallow":
            sizes.pop("pool_size")
        adapter = LongTailPromptAdapter.wrap(vit, classes, query=query, **{**sizes, **options}).eval()
        if adapter.prompt_config.has_groups:
            adapter.pool.init_keys(adapter.queries(digits("train", 120)[0]))
            with torch.no_grad():
                adapter.pool.prompts.normal_(std=0.5)
        adapter.phase = phase
        adapter.eval()
        fit_head(adapter, classes, temperature)
    return adapter


def digit_classifier(method, *, classes=10, temperature=1.3):
    """A classifier without prompts on the small ViT, in eval mode."""
    model = ViTClassifier.wrap(small_vit(), classes, method=method).eval()
    fit_head(model, classes, temperature)
    return model


@torch.no_grad()
def check_results(model, found, images, atol=1e-4):
    """Logits within `atol` of their size, the same groups, and probabilities of the fitted temperature."""
    output = model(images, return_output=True)
    size = output.logits.abs().max()
    assert size > 5, "the logits are those of a fitted head"
    assert (found["logits"] - output.logits).abs().max() < atol * size
    expected = (output.logits / model.metadata.temperature).softmax(1)
    torch.testing.assert_close(found["probabilities"], expected, atol=10 * atol, rtol=0)
    assert ("groups" in found) == bool(output.groups.shape[1])
    if "groups" in found:
        if len(images) > 10:
            assert len(output.groups.unique()) >= min(4, len(model.pool.keys)), "the images select different groups"
        assert torch.equal(found["groups"], output.groups)
