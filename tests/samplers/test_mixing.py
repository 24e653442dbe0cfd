"""Mixup and CutMix of timm and torchvision on batches of DualSampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.data import Mixup
from torchvision.transforms import v2

from lpt_peft.errors import InputError
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


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_minmax": (0.4, 0.6)}])
def test_timm_mixes_across_halves(kind, mode):
    images, target = dual_batch()
    mixed, soft = Mixup(mode=mode, num_classes=10, **kind)(images, target)
    assert partners(mixed) == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(InputError, match="Mixup and CutMix.*class indices only"):
        LPTLoss([1] * 10, epochs=1)(SimpleNamespace(logits=torch.zeros(8, 10), similarity=torch.zeros(8, 0)), soft)


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
    with pytest.raises(InputError, match="Mixup and CutMix.*class indices only"):
        AGCLLoss([1] * 10)(torch.zeros(8, 10), soft)
