"""CosineClassifier against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft import CosineClassifier, cosine_logits
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.heads import class_sums


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_is_a_scaled_cosine(scale):
    head = CosineClassifier(6, 4, scale).double()
    features = torch.randn(5, 6, dtype=torch.float64)
    expected = scale * F.cosine_similarity(features[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine_logits(features * 7, head.weight * 3, scale), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_are_float32_in_low_precision(dtype):
    head = CosineClassifier(64, 10)
    features = torch.randn(3, 64).to(dtype)
    expected = head(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_initial_weight_and_gradient():
    head = CosineClassifier(8, 3)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3))
    head(torch.randn(2, 8)).sum().backward()
    assert head.weight.grad.isfinite().all()
    assert list(head.state_dict()) == ["weight"]
    assert "num_classes=3" in repr(head)


def test_zero_features_give_zero_logits():
    assert torch.equal(CosineClassifier(4, 2)(torch.zeros(1, 4)), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 3), "dim=0 must be an integer of at least 1"),
        ((3, 0), "num_classes=0 must be an integer of at least 1"),
        ((3.5, 3), "dim=3.5 must be an integer"),
        (("3", 3), "dim='3' must be an integer"),
        ((3, None), "num_classes=None must be an integer"),
        ((3, 3, 0), "scale=0 must be a finite number greater than 0"),
        ((3, 3, -20.0), "scale=-20.0 must be"),
        ((3, 3, float("nan")), "scale=nan must be"),
        ((3, 3, float("inf")), "scale=inf must be"),
        ((3, 3, "20"), "scale='20' must be"),
        ((3, 3, True), "scale=True must be"),
    ],
)
def test_invalid_settings(arguments, words):
    with pytest.raises(ConfigError, match=words):
        CosineClassifier(*arguments)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (
            torch.zeros(2, 5),
            r"floating point of shape \(\.\.\., 4\), not torch.float32 of shape \(2, 5\)",
        ),
        (torch.tensor(1.0), r"not torch.float32 of shape \(\): pass pooled features"),
        (torch.zeros(2, 4, dtype=torch.long), "not torch.int64 of shape"),
        (torch.zeros(2, 4, dtype=torch.bool), "not torch.bool of shape"),
        (torch.zeros(2, 4, dtype=torch.complex64), "not torch.complex64 of shape"),
        ([[0.0] * 4], r"features must be a tensor \(\.\.\., 4\), not list"),
        (torch.zeros(2, 4, device="meta"), r"features is on meta, but must be on cpu: pass features\.to\('cpu'\)"),
    ],
)
def test_invalid_features(features, words):
    head = CosineClassifier(4, 3)
    with pytest.raises(InputError, match=words):
        head(features)
    with pytest.raises(InputError, match=words):
        cosine_logits(features, head.weight)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(3, 4, dtype=torch.long), torch.zeros(1, 3, 4)])
def test_invalid_class_vectors(weight):
    with pytest.raises(InputError, match=r"weight must be floating point of shape \(C, 4\), not"):
        cosine_logits(torch.zeros(2, 4), weight)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 5, 4), (0, 5, 4)])
def test_leading_dimensions(shape):
    head, features = CosineClassifier(4, 3), torch.randn(shape)
    logits = head(features)
    assert logits.shape == (*shape[:-1], 3)
    rows = [20 * F.cosine_similarity(row[None], head.weight) for row in features.reshape(-1, 4)]
    expected = torch.stack(rows).view(logits.shape) if rows else logits.detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert head.weight.grad.isfinite().all()


def test_class_means_against_a_loop():
    features, target = torch.randn(40, 6), torch.arange(40) % 4
    head = CosineClassifier(6, 5)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([1.0, 2, 3, 4, 5])[:, None])
    before, norm = head.weight.detach().clone(), float(head.weight.detach().norm(dim=1).mean())
    assert head.init_class_means(class_sums(features, target, 5)) == [4]
    for label in range(4):
        mean = torch.stack([f for f, t in zip(features, target, strict=True) if t == label]).double().mean(0)
        torch.testing.assert_close(head.weight[label].detach(), (norm * mean / mean.norm()).float())
    assert torch.equal(head.weight[4], before[4])
    assert head.weight.requires_grad
    assert head.weight.dtype == torch.float32


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 99))
def test_class_sums_of_batches_add_up(sizes, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(sizes), 3, generator=generator)
    target = torch.randint(num_classes, (sum(sizes),), generator=generator)
    total = sum(class_sums(f, t, num_classes) for f, t in zip(features.split(sizes), target.split(sizes), strict=True))
    onehot = F.one_hot(target, num_classes).double()
    torch.testing.assert_close(total, onehot.T @ features.double(), rtol=1e-12, atol=1e-12)
    assert total.dtype == torch.float64


def test_class_sums_of_half_precision_are_exact():
    features = torch.full((5000, 2), 1.0, dtype=torch.bfloat16)
    assert class_sums(features, torch.zeros(5000, dtype=torch.int32), 1).tolist() == [[5000.0, 5000.0]]


def test_errors_of_class_means():
    features, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    head = CosineClassifier(6, 3)
    before = head.weight.detach().clone()
    with pytest.raises(InputError, match="classes from 0 to 2, and the classes are 0 to 1"):
        class_sums(features, target, 2)
    with pytest.raises(InputError, match="classes from -1 to 2"):
        class_sums(features, torch.tensor([0, -1, 2, 1]), 3)
    with pytest.raises(
        InputError, match=r"integers of shape \(4,\), a class per feature, not torch.int64 of shape \(3,\)"
    ):
        class_sums(features, target[:3], 3)
    with pytest.raises(InputError, match="not torch.float32 of shape"):
        class_sums(features, target.float(), 3)
    with pytest.raises(InputError, match="features must be"):
        class_sums(features[0], target, 3)
    with pytest.raises(InputError, match="sums has 2 rows, and the classifier 3 classes"):
        head.init_class_means(torch.ones(2, 6))
    with pytest.raises(InputError, match=r"sums must be .* shape \(C, 6\)"):
        head.init_class_means(torch.ones(3, 5))
    with pytest.raises(InputError, match="NaN or infinity"):
        head.init_class_means(torch.full((3, 6), float("inf")))
    assert torch.equal(head.weight, before)
