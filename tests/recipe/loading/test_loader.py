"""Worker processes: their number, random numbers, signals, errors and shutdown."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lpt_peft import ShotMetrics
from lpt_peft.data import workers as workers_module
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.data.workers import open_batches, stop_workers
from lpt_peft.errors import InputError
from lpt_peft.recipe import Splits, TrainSettings, evaluate, fit, predict, train
from lpt_peft.recipe.evaluate import Evaluation
from lpt_peft.recipe.loading import loader as loaders
from lpt_peft.recipe.loading.batches import batches
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.resume.checkpoint_io import checkpoints
from tests.processes import Child
from tests.recipe.tiny import (
    COUNTS,
    SETTINGS,
    SHORT,
    FailingLoss,
    PowerCut,
    RandomlyScaled,
    folder_with_a_broken_image,
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


class ProcessIds(Dataset):
    """Images filled with the number of the process that loads them."""

    def __init__(self, size=31):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(os.getpid()), dtype=torch.float64), index % 3


@pytest.fixture
def machine(monkeypatch):
    """Eight megabytes of shared memory and a given number of cores."""

    def set_cores(number):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2048, f_frsize=4096))
    set_cores(6)
    return set_cores


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
    assert random.getstate() == state[0], "reading the first image does not use the generators"
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_a_given_number_is_returned_unchanged(machine, workers):
    machine(2)
    assert resolve_workers(workers, Pixels(3), 10**9) == workers


def test_no_automatic_workers_where_processes_are_not_forked(machine, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert resolve_workers(None, Pixels(1000), 16) == 0


def test_no_automatic_workers_without_shared_memory(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(workers_module, "_SHARED_MEMORY", tmp_path / "nowhere")
    assert resolve_workers(None, Pixels(1000), 16) == 0


@pytest.fixture
def automatic(machine, monkeypatch):
    """Two automatic workers, also for small datasets; returns the numbers of workers of all loaders."""
    seen, original = [], loaders.DataLoader

    def recorded(*args, **options):
        seen.append(options["num_workers"])
        return original(*args, **options)

    machine(2)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2**30, f_frsize=4096))
    monkeypatch.setattr(workers_module, "_SMALL", 1)
    monkeypatch.setattr(loaders, "DataLoader", recorded)
    return seen


def test_automatic_workers_load_the_same_images(automatic, tmp_path):
    """Training, validation, queries and test; cut, and resumed with another number; stored as configured."""
    dataset, labels = striped_data()
    splits = Splits(from_dataset(RandomlyScaled(dataset), labels), striped_data(1)[0], striped_data(2)[0])
    results = {}
    for name, workers in (("auto", None), ("none", 0)):
        adapter = tiny_adapter()
        fit(adapter, splits, replace(SHORT, num_workers=workers), tmp_path / name, progress=False)
        results[name] = result_of(adapter)
        recipe = json.loads((tmp_path / name / "prompts" / "config.json").read_text())["training"]["recipe"]
        assert recipe["num_workers"] == workers
    assert same(results["auto"], results["none"])
    for file in ("history.json", "results.json"):
        assert (tmp_path / "auto" / file).read_text() == (tmp_path / "none" / file).read_text()
    assert automatic == [2] * 6 + [0] * 6, "validation, two phases, queries, and finally validation and test"

    def run(folder, workers, step=None):
        adapter = tiny_adapter()
        settings, loss = replace(SHORT, num_workers=workers), FailingLoss(step)
        train(adapter, RandomlyScaled(dataset), labels, settings, criterion=loss, checkpoints=folder, progress=False)
        return result_of(adapter)

    with pytest.raises(PowerCut):
        run(tmp_path / "cut", None, step=13)
    assert checkpoints(tmp_path / "cut")[-1].name == "2-group-00000004"
    assert same(run(tmp_path / "cut", 0), run(None, 0))


def signalled_run(folder, number):
    """Sends the signal to this process group, as a terminal sends Ctrl-C; the message of the interruption."""

    def signal_group():
        command = ["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"]
        subprocess.run(command, start_new_session=True, check=True)  # not a member of the group itself

    dataset, labels = striped_data()
    settings = replace(SHORT, num_workers=2, save_every=1000)
    loss = FailingLoss(4, signal_group)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tiny_adapter(), dataset, labels, settings, criterion=loss, checkpoints=folder, progress=False)
    return str(stopped.value)


def signalled_runs(folder):
    return [signalled_run(folder / str(int(number)), number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_signal_to_the_process_group_saves_the_run(tmp_path):
    """As sent by terminals (Ctrl-C) and clusters (SIGTERM): the workers leave it to the training process."""
    with Child(signalled_runs, tmp_path) as child:
        messages = child.result()
    assert [message.split(",")[0] for message in messages] == ["stopped after step 5 of phase shared"] * 2
    for folder in tmp_path.iterdir():
        assert [path.name for path in checkpoints(folder)] == ["1-shared-00000005"]


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


class BrokenImages(Dataset):
    """The second half cannot be read."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index >= 20:
            raise InputError(f"image {index} cannot be read")
        return torch.zeros(3, 4, 4), 0


def consume_until_error(loader, fail_in_loop):
    """Iterate in a frame that the traceback keeps alive."""
    with open_batches(loader) as loaded:
        for number, _ in enumerate(loaded):
            if fail_in_loop and number == 1:
                raise InputError("in the loop")


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("fail_in_loop", [False, True])
def test_workers_stop_at_once_after_an_error(monkeypatch, persistent, fail_in_loop):
    """They end by themselves; a worker that hangs would be terminated by a signal."""
    workers = []

    def stop(*args):
        workers.extend(multiprocessing.active_children())
        stop_workers(*args)

    monkeypatch.setattr(workers_module, "stop_workers", stop)
    loader = image_loader(BrokenImages(), batch_size=4, num_workers=2, persistent=persistent)
    with pytest.raises(InputError, match="in the loop" if fail_in_loop else "cannot be read") as error:
        consume_until_error(loader, fail_in_loop)
    assert not multiprocessing.active_children()
    del error
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_stop_when_a_run_fails(capfd):
    """Training and persistent validation workers, after an error in a step."""
    dataset, labels = striped_data()
    settings = replace(SHORT, num_workers=1)
    with pytest.raises(PowerCut):
        train(
            tiny_adapter(),
            dataset,
            labels,
            settings,
            validation=striped_data(1)[0],
            criterion=FailingLoss(6),
            progress=False,
        )
    assert not multiprocessing.active_children()
    gc.collect()
    assert "Bad file descriptor" not in capfd.readouterr().err


def test_a_persistent_loader_can_be_used_after_an_error():
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
    loader = image_loader(images, batch_size=4, num_workers=1, persistent=True)
    with pytest.raises(IndexError), open_batches(loader) as loaded:
        next(loaded)[2]
    with open_batches(loader) as loaded:
        assert torch.equal(torch.cat([batch for batch, _ in loaded]), images.tensors[0])
    assert multiprocessing.active_children()
    stop_workers(loader)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("persistent", "processes"), [(True, 2), (False, 6)])
def test_an_evaluation_can_keep_its_workers(persistent, processes):
    seen = set()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images, return_output):
            seen.update(images[:, 0, 0, 0].tolist())
            return (torch.zeros(len(images), 3),)

    evaluation = Evaluation(Model(), ProcessIds(), batch_size=8, num_workers=2, persistent=persistent)
    results = [evaluation(ShotMetrics(COUNTS)) for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert len(seen) == processes
    assert os.getpid() not in seen
    evaluation.close()
    assert not multiprocessing.active_children()


def test_workers_load_datasets_that_cannot_be_pickled():
    """They are forked: lambdas work, and scripts without a main guard."""
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
    images.transform = lambda image: image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking a process with threads
        loaded = list(image_loader(images, batch_size=4, num_workers=1))
    assert torch.equal(torch.cat([batch for batch, _ in loaded]), images.tensors[0])


def test_loading_does_not_use_the_callers_generators():
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        list(image_loader(images, batch_size=4, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]


def test_the_benchmark_of_the_loader_runs(capsys):
    module = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "benchmarks" / "loader.py"))
    small = module["Settings"](num_images=12, pixels=64, img_size=32, batch_size=8, workers=(0, 1), rounds=1)
    with torch.random.fork_rng(devices=[]):
        module["main"](small)
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("12 JPEGs of 64 px, ")
    assert lines[3:6] == ["Pillow, decoding alone", "loader, 0 workers", "loader, 1 workers"]
    assert lines[7:] == ["lpt-peft train", "0 workers", "1 workers"]


def test_the_default_is_automatic():
    assert TrainSettings().num_workers is None


@pytest.mark.parametrize("pin", [False, True])
def test_batches_are_pinned_if_configured(pin):
    dataset, labels = striped_data()
    loader = batches(dataset, labels, SETTINGS, "shared", epochs=1, pin_memory=pin)
    assert loader.pin_memory is pin
