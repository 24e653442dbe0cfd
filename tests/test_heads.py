"""CosineClassifier against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lpt_peft import CosineClassifier, cosine_logits
from lpt_peft.errors import ConfigError, InputError


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
