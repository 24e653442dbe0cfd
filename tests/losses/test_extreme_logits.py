"""All losses with extreme and masked logits in every dtype, with and without autocast."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lpt_peft.losses import AGCLLoss, LogitAdjustedLoss, LPTLoss
from tests.losses.oracle import Output

COUNTS = [1000, 300, 100, 30, 10, 3, 1]
LOSSES = {
    "agcl": lambda: AGCLLoss(COUNTS),
    "agcl, instance branch, no smoothing": lambda: AGCLLoss(COUNTS, gamma_pos=0.5, gamma_neg=8, label_smoothing=0.0),
    "lpt": lambda: LPTLoss(COUNTS, 4),
    "logit-adjusted": lambda: LogitAdjustedLoss(COUNTS, label_smoothing=0.1),
}


def extreme_logits(dtype):
    largest, tiny, eye = torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.eye(7)[:4].double()
    logits = {
        "zeros": 0 * eye,
        "largest": 0 * eye + largest,
        "smallest": 0 * eye - largest,
        "mixed": torch.tensor([[largest, -largest, largest, 0, -largest, largest, -largest]] * 4, dtype=torch.float64),
        "a single largest": largest * eye,
        "masked": torch.where(eye > 0, 5.0, -math.inf),
        "infinite": torch.where(eye > 0, math.inf, 0.0),
        "tiny": 0 * eye + tiny,
        "confident": 100 * eye - 50,
    }
    return {name: values.to(dtype) for name, values in logits.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_finite(loss, dtype):
    criterion = LOSSES[loss]()
    labels = torch.tensor([0, 6, 3, 3])
    mixed = 0.4 * F.one_hot(labels, 7) + 0.6 * F.one_hot(labels.flip(0), 7)
    targets = {
        "labels": labels,
        "mixed": mixed,
        "mixed in dtype": mixed.to(dtype),
        "uniform": torch.full((4, 7), 1 / 7),
    }
    cases = itertools.product(extreme_logits(dtype).items(), targets.items(), [None, torch.bfloat16, torch.float16])
    for (name, values), (kind, target), autocast in cases:
        logits = values.clone().requires_grad_()
        output = Output(logits, torch.rand(4, 2).to(dtype)) if isinstance(criterion, LPTLoss) else logits
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            value = criterion(output, target)
        value.backward()
        case = (name, kind, autocast)
        assert value.dtype == torch.promote_types(dtype, torch.float32), case
        assert value.isfinite(), case
        assert value >= -1e-6, case
        assert logits.grad.isfinite().all(), case
