"""Worker processes: how many, what they draw, what they do about signals and broken images."""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import signal
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lpt_peft import ShotMetrics
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import InputError
from lpt_peft.recipe import Parts, TrainSettings, evaluate, fit, predict, train
from lpt_peft.recipe.evaluate import Evaluation
from lpt_peft.recipe.loading import loader as loaders
from lpt_peft.recipe.loading.batches import batches
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.resume.checkpoint_io import checkpoints
from tests.recipe.tiny import (
    COUNTS,
    SETTINGS,
    SHORT,
    QuietLoss,
    Shaken,
    folder_with_a_broken_image,
    in_child,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)


class Pixels(Dataset):
    """Images of one size that count how often they are read."""

    def __init__(self, size, shape=(3, 4, 4)):
        self.size, self.shape, self.reads = size, shape, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        random.random(), torch.rand(())
        return torch.zeros(self.shape), 0


class Deadly(QuietLoss):
    """The objective, which kills its process in a step; None: never."""

    def __init__(self, left):
        super().__init__(4)
        self.left = left

    def forward(self, output, target, epoch):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(output, target, epoch)


class Workers(Dataset):
    """Items that name the process that loads them."""

    def __init__(self, size=31):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(os.getpid()), dtype=torch.float64), index % 3


@pytest.fixture
def machine(monkeypatch):
    """Eight megabytes of shared memory and as many cores as asked for."""

    def cores(number):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2048, f_frsize=4096))
    cores(6)
    return cores


@pytest.mark.parametrize(("cores", "processes", "workers"), [(6, 1, 6), (32, 1, 8), (16, 4, 4), (3, 2, 1), (1, 2, 0)])
def test_automatic_workers_are_the_cores_of_the_process(machine, monkeypatch, cores, processes, workers):
    machine(cores)
    if processes > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert resolve_workers(None, Pixels(256), 16) == workers


def test_small_datasets_have_no_workers_and_are_not_read(machine):
    small = Pixels(255)
    assert resolve_workers(None, small, 16) == 0
    assert small.reads == 0


def test_shared_memory_limits_automatic_workers(machine):
    """8 MiB hold 10 batches of 800 KiB: three workers of three batches each."""
    images = Pixels(256, (3, 64, 64))
    state = random.getstate(), torch.get_rng_state()
    assert resolve_workers(None, images, 16) == 3
    assert resolve_workers(None, images, 64) == 0
    assert random.getstate() == state[0], "the look at the first image draws nothing"
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("asked", [0, 1, 7])
def test_a_number_is_taken_as_it_is(machine, asked):
    machine(2)
    assert resolve_workers(asked, Pixels(3), 10**9) == asked


def test_no_automatic_workers_where_processes_are_not_forked(machine, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert resolve_workers(None, Pixels(1000), 16) == 0


def test_no_automatic_workers_without_shared_memory(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(loaders, "_SHARED_MEMORY", tmp_path / "nowhere")
    assert resolve_workers(None, Pixels(1000), 16) == 0


@pytest.fixture
def automatic(machine, monkeypatch):
    """Two automatic workers, for the tests' small datasets as well; the numbers of workers of all loaders."""
    seen, original = [], loaders.DataLoader

    def noted(*args, **options):
        seen.append(options["num_workers"])
        return original(*args, **options)

    machine(2)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2**30, f_frsize=4096))
    monkeypatch.setattr(loaders, "_SMALL", 1)
    monkeypatch.setattr(loaders, "DataLoader", noted)
    return seen


def test_automatic_workers_draw_what_no_workers_draw(automatic, tmp_path):
    """Training, validation, queries and test; killed and resumed with another number; asked for, not resolved."""
    dataset, labels = striped_data()
    parts = Parts(from_dataset(Shaken(dataset), labels), striped_data(1)[0], striped_data(2)[0])
    results = {}
    for name, workers in (("auto", None), ("none", 0)):
        adapter = tiny_adapter()
        fit(adapter, parts, replace(SHORT, num_workers=workers), tmp_path / name, progress=False)
        results[name] = result_of(adapter)
        recipe = json.loads((tmp_path / name / "prompts" / "config.json").read_text())["training"]["recipe"]
        assert recipe["num_workers"] == workers
    assert same(results["auto"], results["none"])
    for file in ("history.json", "results.json"):
        assert (tmp_path / "auto" / file).read_text() == (tmp_path / "none" / file).read_text()
    assert automatic == [2] * 6 + [0] * 6, "validation, two phases, queries, and in the end validation and test"

    def run(folder, workers, left=None):
        adapter = tiny_adapter()
        settings, loss = replace(SHORT, num_workers=workers), Deadly(left)
        train(adapter, Shaken(dataset), labels, settings, criterion=loss, checkpoints=folder, progress=False)
        return result_of(adapter)

    assert in_child(lambda: run(tmp_path / "cut", None, left=13)) == -signal.SIGKILL
    assert checkpoints(tmp_path / "cut")[-1].name == "2-group-00000004"
    assert same(run(tmp_path / "cut", 0), run(None, 0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_saves_the_run(tmp_path, number):
    """As a terminal sends Ctrl-C, and clusters SIGTERM: the workers leave it to the process that trains."""
    dataset, labels = striped_data()
    settings = replace(SHORT, num_workers=2, save_every=1000)

    def interrupted():
        class Interrupting(QuietLoss):
            left = 5

            def forward(self, output, target, epoch):
                Interrupting.left -= 1
                if Interrupting.left == 0:
                    kill = ["kill", f"-{int(number)}", "--", f"-{os.getpid()}"]
                    subprocess.run(kill, start_new_session=True, check=True)  # from outside of the group
                    time.sleep(0.2)
                return super().forward(output, target, epoch)

        os.setpgid(0, 0)
        train(
            tiny_adapter(),
            dataset,
            labels,
            settings,
            criterion=Interrupting(4),
            checkpoints=tmp_path,
            progress=False,
        )

    assert in_child(interrupted) == 130, "KeyboardInterrupt"
    assert [path.name for path in checkpoints(tmp_path)] == ["1-shared-00000005"]


def test_an_unreadable_image_is_named_by_workers(tmp_path):
    folder_with_a_broken_image(tmp_path)
    adapter = tiny_adapter()
    images = image_folder(tmp_path, transform=transforms(adapter.backbone.preprocess(), train=True))
    words = r"class 1/23\.png \(index 23\) cannot be read: UnidentifiedImageError"
    with pytest.raises(InputError, match=words):
        train(adapter, images, images.labels, replace(SETTINGS, num_workers=2), progress=False)
    with pytest.raises(InputError, match=words):
        evaluate(adapter, images, ShotMetrics(COUNTS), num_workers=2)
    with pytest.raises(InputError, match=words):
        predict(adapter, images, num_workers=2)
    gc.collect()  # iterators that raised lie in cycles with their tracebacks: not to be inherited by later forks


@pytest.mark.parametrize(("persistent", "processes"), [(True, 2), (False, 6)])
def test_an_evaluation_may_keep_its_workers(persistent, processes):
    seen = set()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images, return_output):
            seen.update(images[:, 0, 0, 0].tolist())
            return (torch.zeros(len(images), 3),)

    evaluation = Evaluation(Model(), Workers(), batch_size=8, num_workers=2, persistent=persistent)
    results = [evaluation(ShotMetrics(COUNTS)) for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert len(seen) == processes
    assert os.getpid() not in seen


def test_workers_take_what_cannot_be_pickled():
    """They are forked: a lambda is no obstacle, nor a script without a main guard."""
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
    images.transform = lambda image: image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        loaded = list(image_loader(images, batch_size=4, num_workers=1))
    assert torch.equal(torch.cat([batch for batch, _ in loaded]), images.tensors[0])


def test_loading_draws_nothing_from_the_callers_generators():
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        list(image_loader(images, batch_size=4, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]


def test_the_benchmark_of_the_loader_runs(capsys):
    module = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "benchmarks" / "loader.py"))
    small = module["Settings"](num_images=12, pixels=64, img_size=32, batch_size=4, workers=(0, 1), rounds=1)
    with torch.random.fork_rng(devices=[]):
        module["main"](small)
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("12 JPEGs of 64 px, ")
    assert lines[3:6] == ["Pillow, decoding alone", "loader, 0 workers", "loader, 1 workers"]
    assert lines[7:] == ["lpt-peft train", "0 workers", "1 workers"]


def test_the_default_is_automatic():
    assert TrainSettings().num_workers is None


@pytest.mark.parametrize("pin", [False, True])
def test_batches_are_pinned_where_asked(pin):
    dataset, labels = striped_data()
    loader = batches(dataset, labels, SETTINGS, "shared", epochs=1, pin_memory=pin)
    assert loader.pin_memory is pin
