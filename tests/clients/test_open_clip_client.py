"""A CLIP whose encode_image uses prompts, as in `docs/how-to/open-clip.md`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip")
from open_clip import build_zero_shot_classifier  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

from lpt_peft import LongTailPromptAdapter  # noqa: E402

VISION = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"width": 16, "heads": 2, "layers": 2, "context_length": 8, "vocab_size": 50}
NAMES = ["cat", "dog", "emu"]
phases = pytest.mark.parametrize("phase", ["shared", "group"])
kinds = pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])


class PromptedTower(nn.Module):
    """The eight lines of `docs/how-to/open-clip.md`."""

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter
        self.set_grad_checkpointing = adapter.set_grad_checkpointing

    def forward(self, images):
        return self.adapter.features(images)


def clip(kind=CLIP):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(20, VISION, TEXT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrapped(model, phase="shared"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = LongTailPromptAdapter.wrap(model.visual, len(NAMES), prompt_length=2, pool_size=4, query="final")
    adapter.phase = phase
    return adapter


def prompted(phase="shared", kind=CLIP):
    model = clip(kind)
    model.requires_grad_(False)
    adapter = wrapped(model, phase)
    adapter.head.requires_grad_(False)  # classes are given by their names
    model.visual = PromptedTower(adapter)
    return model, adapter


def tokenizer(texts):
    """Words to tokens of the tiny vocabulary; the end of the text has the highest number."""
    rows = [[1, *(sum(map(ord, word)) % 40 + 2 for word in text.split()), 49] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@phases
@kinds
def test_encode_image_has_no_prompts(kind, phase, images):
    """Wrapping `model.visual` does not change `model`, so a loss of its features trains no prompt."""
    model = clip(kind).eval()
    before = model.encode_image(images)
    adapter = wrapped(model, phase)
    torch.testing.assert_close(model.encode_image(images), before)
    loss = ClipLoss()(*model(images, tokenizer(NAMES * 2)))
    loss.backward()  # works, because the text tower is trainable
    assert all(parameter.grad is None for parameter in adapter.trainable_parameters())
    with torch.no_grad():
        adapter.shared.prompts.add_(1.0)
    torch.testing.assert_close(model.encode_image(images), before)
    assert not torch.allclose(adapter.features(images), before, atol=1e-2)


@phases
@kinds
def test_a_prompted_tower_passes_gradients_to_prompts(kind, phase, images):
    model, adapter = prompted(phase, kind)
    model.eval()
    assert torch.equal(model.encode_image(images), adapter.features(images))
    unit = model.encode_image(images, normalize=True)
    torch.testing.assert_close(unit, nn.functional.normalize(adapter.features(images), dim=-1))
    assert not torch.allclose(model.encode_image(images), clip(kind).eval().encode_image(images), atol=1e-3)
    model.train()
    ClipLoss()(*model(images, tokenizer(NAMES * 2))).backward()
    trainable = dict(adapter.named_parameters())
    name = "shared.prompts" if phase == "shared" else "pool.prompts"
    assert trainable[name].grad.abs().sum() > 0
    others = {key for key, value in model.named_parameters() if value.grad is not None}
    assert others == {f"visual.adapter.{key}" for key in ({name} if phase == "shared" else {name, "pool.keys"})}


@phases
def test_gradients_equal_finite_differences(phase, images):
    """Central differences in float64, through encode_image and the text features."""
    model, adapter = prompted(phase)
    model.double().eval()
    tokens, batch = tokenizer(NAMES * 2), images.double()

    def loss():
        return ClipLoss()(*model(batch, tokens))

    loss().backward()
    prompts = adapter.shared.prompts if phase == "shared" else adapter.pool.prompts
    direction = torch.randn(prompts.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step, start = 1e-5, prompts.detach().clone()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            prompts.copy_(start + sign * step * direction)
            values.append(loss().item())
    torch.testing.assert_close(
        (prompts.grad * direction).sum().item(), (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-9
    )


@phases
def test_zero_shot_classification_trains_and_classifies(phase):
    """open_clip's own zero-shot classifier on prompted image features: prompts alone halve its loss."""
    model, adapter = prompted(phase)
    classifier = build_zero_shot_classifier(model, tokenizer, NAMES, ["a {}", "one {}"], num_classes_per_batch=None)
    assert classifier.shape == (20, len(NAMES))
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(len(NAMES), 3, 32, 32, generator=generator)
    images = means[target] + 0.2 * torch.randn(6, 3, 32, 32, generator=generator)
    optimizer = torch.optim.Adam(adapter.trainable_parameters(), lr=0.02)
    losses = []
    model.train()
    for _ in range(60):
        logits = 100 * model.encode_image(images, normalize=True) @ classifier
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        logits = 100 * model.encode_image(images, normalize=True) @ classifier
        assert nn.functional.cross_entropy(logits, target) < 0.5 * losses[0]
        # What another program loads from the checkpoint of the model.
        again, other = prompted("shared")
        again.eval().load_state_dict(model.state_dict())
        assert other.phase == phase
        assert torch.equal(again.encode_image(images), model.encode_image(images))


@phases
def test_prompt_file_round_trip(phase, images, tmp_path):
    model, adapter = prompted(phase)
    model.eval()
    with torch.no_grad():
        for parameter in adapter.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path)
    fresh = clip().eval()
    fresh.visual = PromptedTower(LongTailPromptAdapter.from_pretrained(tmp_path, fresh.visual))
    torch.testing.assert_close(fresh.encode_image(images), model.encode_image(images))
    tower = fresh.visual.adapter.unwrap()
    fresh.visual = tower
    torch.testing.assert_close(fresh.encode_image(images), clip().eval().encode_image(images))


@phases
def test_checkpointing_through_the_whole_model(phase, images):
    """`model.set_grad_checkpointing()` calls that of the tower; gradients do not change."""
    found = []
    for checkpointing in (False, True):
        model, adapter = prompted(phase)
        model.train()
        if checkpointing:
            model.set_grad_checkpointing(True)
            assert adapter.vit.transformer.grad_checkpointing
        ClipLoss()(*model(images, tokenizer(NAMES * 2))).backward()
        found.append([parameter.grad for parameter in adapter.trainable_parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True))
