"""CosineClassifier against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lpt_peft import CosineClassifier, cosine_logits
from lpt_peft.errors import ConfigError


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


def test_invalid_sizes():
    with pytest.raises(ConfigError, match="at least 1"):
        CosineClassifier(0, 3)
