"""Mixup and CutMix of timm and torchvision on batches of DualSampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torchvision.transforms import v2

from lpt_peft.losses import AGCLLoss, LPTLoss
from lpt_peft.samplers import DualSampler
from tests.samplers.draws import LONG_TAIL


def dual_batch():
    """Images and labels of a batch of 8. The image of row i is 1 in channel i and 0 elsewhere."""
    rows = next(iter(DualSampler(LONG_TAIL, 8)))
    images = torch.eye(8)[:, :, None, None].expand(8, 8, 16, 16).clone()
    return images, torch.tensor([LONG_TAIL[row] for row in rows])


def partners(mixed):
    """For each row, the other row that is mixed into it."""
    found = []
    for row, channels in enumerate(mixed.amax((2, 3))):
        (other,) = {channel for channel in range(8) if channels[channel] > 0} - {row}
        found.append(other)
    return found


def output_of(rows):
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(logits=10 * torch.randn(rows, 10, generator=generator), similarity=torch.zeros(rows, 0))


def expected_objective(soft):
    """LPTLoss at epoch 0 without noise: sum over labels of the probability times A-GCL of the label."""
    logits, total = output_of(8).logits, 0.0
    for half, weight, gammas in ((slice(0, 4), 0.5, (0.5, 8.0)), (slice(4, 8), 1.0, (0.0, 4.0))):
        rows = AGCLLoss([1] * 10, gamma_pos=gammas[0], gamma_neg=gammas[1], reduction="none").eval()
        losses = torch.stack([rows(logits[half], torch.full((4,), label)) for label in range(10)], 1)
        total = total + weight * (soft[half] * losses).sum(1).mean()
    return total


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_minmax": (0.4, 0.6)}])
def test_timm_mixes_across_halves(kind, mode):
    images, target = dual_batch()
    mixed, soft = Mixup(mode=mode, num_classes=10, **kind)(images, target)
    assert partners(mixed) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert soft.shape == (8, 10)
    torch.testing.assert_close(LPTLoss([1] * 10, epochs=1).eval()(output_of(8), soft), expected_objective(soft))


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_torchvision_mixes_within_halves_except_first_rows(kind):
    images, target = dual_batch()
    with torch.random.fork_rng():
        torch.manual_seed(2)  # gives a CutMix box that is not empty
        mix = kind(num_classes=10)
        mixed, soft = mix(images, target)
        assert partners(mixed) == [7, 0, 1, 2, 3, 4, 5, 6]
        separate_halves = [mix(images[rows], target[rows])[0] for rows in (slice(4), slice(4, 8))]
    assert partners(torch.cat(separate_halves)) == [3, 0, 1, 2, 7, 4, 5, 6]
    torch.testing.assert_close(LPTLoss([1] * 10, epochs=1).eval()(output_of(8), soft), expected_objective(soft))


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_mixing_within_halves_keeps_their_class_frequencies(kind):
    images, target = dual_batch()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        mix = kind(num_classes=10)
        halves = [mix(*half) for half in zip(images.chunk(2), target.chunk(2), strict=True)]
    images, soft = (torch.cat(tensors) for tensors in zip(*halves, strict=True))
    one_hot = F.one_hot(target, 10).float()
    for mixed, labels in zip(soft.chunk(2), one_hot.chunk(2), strict=True):
        torch.testing.assert_close(mixed.mean(0), labels.mean(0))
    criterion = LPTLoss(class_counts=[60, 25, 9, 1, 1, 4, 1, 2, 1, 1], epochs=4)
    assert criterion(output_of(8), soft).isfinite()
    only_first = torch.cat([soft[:4], one_hot[4:]])
    terms = [criterion.eval().terms(output_of(8), labels) for labels in (only_first, target)]
    torch.testing.assert_close(terms[0]["balanced_agcl"], terms[1]["balanced_agcl"])
