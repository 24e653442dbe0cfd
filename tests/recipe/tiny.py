"""What the tests of the recipe share: a tiny adapter, striped images, and processes to kill. No tests here."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from dataclasses import replace

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from lpt_peft import LongTailPromptAdapter, LPTLoss
from lpt_peft.recipe import PhaseSettings, TrainSettings
from tests.conftest import tiny_vit

COUNTS = [20, 8, 3]
PHASE = PhaseSettings(epochs=4, learning_rate=2.0)
SETTINGS = TrainSettings(shared=PHASE, group=PHASE, batch_size=8)
SHORT = replace(SETTINGS, shared=replace(PHASE, epochs=2), group=replace(PHASE, epochs=2), save_every=2)


def folder_with_a_broken_image(root):
    """Class folders of the sizes in COUNTS; image 23, of class 1, is no picture."""
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    for number, label in enumerate(labels):
        folder = root / f"class {label}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / f"{number:02}.png")
    (root / "class 1" / "23.png").write_bytes(b"no picture")


def striped_data(seed=0, dtype=torch.float32):
    """Three classes that a stripe's place tells apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    images = 0.3 * torch.randn(len(labels), 3, 32, 32, generator=generator, dtype=dtype)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 2
    return TensorDataset(images, torch.tensor(labels)), labels


def noisy_validation():
    """Images that hardly tell the classes apart: accuracy goes up and down."""
    dataset, labels = striped_data(3)
    generator = torch.Generator().manual_seed(4)
    images = dataset.tensors[0]
    return TensorDataset(images + 4 * torch.randn(images.shape, generator=generator), torch.tensor(labels))


class Shaken(Dataset):
    """Images changed at random, by all three generators that a transform may draw from."""

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
        return LongTailPromptAdapter.wrap(tiny_vit().to(dtype), 3, prompt_length=2, pool_size=4, **options)


class QuietLoss(LPTLoss):
    """The objective without its noise: a function of the images alone."""

    def __init__(self, epochs, counts=COUNTS):
        super().__init__(counts, epochs, noise_scale=0.0)


def result_of(adapter):
    """Everything that a run leaves in an adapter."""
    tensors = {name: tensor.clone() for name, tensor in adapter.adapter_state_dict().items()}
    return {**tensors, "usage": adapter.pool.usage.clone()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_child(function, *, kill_after=None):
    """Call in a forked process; how that ended: 0, or minus the signal. `kill_after` seconds it is killed (-9)."""
    child = _fork(function)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_ranks(function, world=2):
    """Call function() on `world` gloo processes, as torchrun would: when one dies, the others are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def enter(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function()

    children = {_fork(lambda rank=rank: enter(rank)) for rank in range(world)}
    codes = []
    while children:
        child, status = os.waitpid(-1, 0)
        if child not in children:
            continue
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return codes


def _fork(function):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", flush=True)
    os._exit(status)
