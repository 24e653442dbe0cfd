"""Shared by the tests of the recipe: a tiny adapter, striped images, and interruptions of a run. No tests here."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from lpt_peft import LongTailPromptAdapter, LPTLoss
from lpt_peft.recipe import PhaseSettings, TrainSettings
from tests.conftest import tiny_vit

COUNTS = [20, 8, 3]
PHASE = PhaseSettings(epochs=4, learning_rate=2.0, pool_learning_rate=2.0)
TWO_PHASES = {"phases": "decoupled", "optimizer": "sgd", "init_prompts": "random", "init_groups": "shared"}
"""Phases in sequence, without a pass over images for the prompts: few steps of SGD, whose result is easy to predict."""
SETTINGS = TrainSettings(shared=replace(PHASE, pool_learning_rate=None), group=PHASE, batch_size=16, **TWO_PHASES)
SHORT = replace(SETTINGS, shared=replace(PHASE, epochs=2), group=replace(PHASE, epochs=2), save_every=2)
STEPS_PER_EPOCH = sum(COUNTS) // 8 + 1


def folder_with_a_broken_image(root):
    """Class folders of the sizes in COUNTS; image 23, of class 1, cannot be decoded."""
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    for number, label in enumerate(labels):
        folder = root / f"class {label}"
        folder.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (32, 32)).save(folder / f"{number:02}.png")
    (root / "class 1" / "23.png").write_bytes(b"not an image")


def striped_data(seed=0, dtype=torch.float32):
    """Three classes, distinguished by the position of a stripe."""
    generator = torch.Generator().manual_seed(seed)
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    images = 0.3 * torch.randn(len(labels), 3, 32, 32, generator=generator, dtype=dtype)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 2
    return TensorDataset(images, torch.tensor(labels)), labels


def noisy_validation():
    """Images that barely distinguish the classes: accuracy goes up and down."""
    dataset, labels = striped_data(3)
    generator = torch.Generator().manual_seed(4)
    images = dataset.tensors[0]
    return TensorDataset(images + 4 * torch.randn(images.shape, generator=generator), torch.tensor(labels))


class RandomlyScaled(Dataset):
    """Images scaled at random, by all three generators that a transform may use."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image * (1 + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand()), label


def tiny_adapter(dtype=torch.float32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"prompt_length": 2, "pool_size": 4, "query": "final", **options}
        return LongTailPromptAdapter.wrap(tiny_vit().to(dtype), 3, **sizes)


class NoiseFreeLoss(LPTLoss):
    """The objective without its noise: a function of the images alone."""

    def __init__(self, epochs, counts=COUNTS):
        super().__init__(counts, epochs, noise_scale=0.0)


class PowerCut(BaseException):
    """Ends a run as a kill does: the library handles no such exception, so nothing more is written."""


def power_cut():
    raise PowerCut


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


class FailingLoss(NoiseFreeLoss):
    """The objective, which calls `fail` in the middle of step `step` of this process; None: never."""

    def __init__(self, step=None, fail=power_cut, epochs=8):
        super().__init__(epochs)
        self.remaining, self.fail = step, fail

    def forward(self, output, target, epoch):
        if self.remaining == 0:
            self.fail()
        self.remaining = None if self.remaining is None else self.remaining - 1
        return super().forward(output, target, epoch)


def result_of(adapter):
    """Everything that a run leaves in an adapter."""
    tensors = {name: tensor.clone() for name, tensor in adapter.adapter_state_dict().items()}
    return {**tensors, "usage": adapter.pool.usage.clone()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
