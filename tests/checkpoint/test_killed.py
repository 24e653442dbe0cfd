"""Killed writers: readers find the old file or the new, complete, and the next save removes what was left."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from lpt_peft import _files
from lpt_peft._files import write_atomic_folder
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.checkpoint.files import write_files
from lpt_peft.errors import PromptFileNotFoundError
from tests.checkpoint.adapters import NAMES, contents, tiny_content, tiny_encoded

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
SPAWN = multiprocessing.get_context("spawn")
STEPS = 8  # file system calls of a save that are counted below; the last test shows that there are no more


def write_files_of(folder, seed):
    encoded = tiny_encoded(seed)
    write_files(folder, encoded.weights, encoded.copy)


def save_and_die(folder, pairs, results):
    """For each (folder, step): write, and die before the given file system call; one child of this process each.

    Runs in a spawned process with a single thread, where fork is safe.
    """
    for seed in (0, 1, 2, 3):
        tiny_encoded(seed)
    for name, old, step in pairs:
        child = os.fork()
        if child == 0:
            die_before(step)
            write_files_of(Path(folder) / name, 1 if old != 1 else 2)
            os._exit(0)
        results.put((name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def die_before(step):
    """Kill this process before its n-th call of replace, unlink or fsync."""
    calls = [0]

    def counted(original):
        def call(*args, **kwargs):
            if calls[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return original(*args, **kwargs)

        return call

    for name in ("replace", "unlink"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)


def test_killed_at_every_step(tmp_path, monkeypatch):
    """Before each file system call, in an empty folder, over a prompt file, and over the traces of a killed writer."""
    cases = [(f"{kind}-{step}", kind, step) for kind in ("empty", "old", "killed") for step in range(STEPS + 1)]
    for name, kind, _ in cases:
        (tmp_path / name).mkdir()
        if kind != "empty":
            write_files_of(tmp_path / name, 0)
        if kind == "killed":
            for file in NAMES:
                (tmp_path / name / f".{file}.{'0' * 32}.tmp").write_bytes(b"half of")
    results = SPAWN.Queue()
    process = SPAWN.Process(target=save_and_die, args=(str(tmp_path), [(n, 0, s) for n, _, s in cases], results))
    process.start()
    codes = dict(results.get(timeout=300) for _ in cases)
    process.join()
    monkeypatch.setattr(_files, "_ABANDONED_SECONDS", -1.0)
    weights = [tiny_encoded(seed).weights for seed in (0, 1)]
    found = {name: (tmp_path / name / "prompts.safetensors") for name, _, _ in cases}
    states = {}
    for name, kind, step in cases:
        if kind == "empty" and not found[name].exists():
            with pytest.raises(PromptFileNotFoundError):
                read_prompt_file(tmp_path / name)
            states[name] = None
        else:
            read_prompt_file(tmp_path / name)
            states[name] = weights.index(found[name].read_bytes())
        assert codes[name] == (0 if step >= STEPS else -signal.SIGKILL), name
        write_files_of(tmp_path / name, 3)  # the next save completes, and removes temporary files
        assert contents(tmp_path / name).keys() == NAMES
        assert found[name].read_bytes() == tiny_encoded(3).weights
    for kind, first in (("empty", None), ("old", 0), ("killed", 0)):
        order = [states[f"{kind}-{step}"] for step in range(STEPS + 1)]
        assert order[0] == first
        assert order[-1] == 1
        change = order.index(1)
        assert set(order[:change]) == {first}
        assert set(order[change:]) == {1}


def kill_at_random_moments(folder, rounds, results):
    """Children of this process write forever and are killed; reports the index of each file found after that."""
    encoded = [tiny_encoded(seed) for seed in range(4)]
    moments = random.Random(0)
    start = time.perf_counter()
    write_files(Path(folder), encoded[0].weights, encoded[0].copy)
    save = time.perf_counter() - start  # on this machine, as busy as it is
    for turn in range(rounds):
        seeds = (0, 1) if turn % 4 < 2 else (2, 3)
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            for count in itertools.count():
                chosen = encoded[seeds[count % 2]]
                write_files(Path(folder), chosen.weights, chosen.copy)
                os.write(started, b".")
        os.close(started)
        if turn % 2:
            os.read(ready, 1)  # the first save is complete, the next is under way
        time.sleep(3 * save * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        found = (Path(folder) / "prompts.safetensors").read_bytes()
        results.put([encoding.weights for encoding in encoded].index(found))


@pytest.mark.slow
def test_writers_killed_at_random_moments(tmp_path):
    results = SPAWN.Queue()
    process = SPAWN.Process(target=kill_at_random_moments, args=(str(tmp_path), 100, results))
    process.start()
    found = [results.get(timeout=120) for _ in range(100)]
    process.join()
    assert process.exitcode == 0
    for turn in range(1, 100, 2):
        assert found[turn] in ((0, 1) if turn % 4 < 2 else (2, 3))
    assert len(set(found)) == 4
    read_prompt_file(tmp_path)


def test_temporary_files_of_a_live_writer_stay(tmp_path):
    young = tmp_path / f".prompts.safetensors.{'0' * 32}.tmp"
    young.write_bytes(b"half of")
    write_files_of(tmp_path, 0)
    assert young.exists()


def test_hidden_files_of_the_user_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_ABANDONED_SECONDS", -1.0)
    names = {".config.json.swp", ".prompts.safetensors.0.tmp", ".git", f".config.json.{'0' * 32}.tmp~"}
    for name in names:
        (tmp_path / name).write_text("text")
    write_files_of(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == names | NAMES


def test_a_folder_is_complete_or_absent(tmp_path, monkeypatch):
    """The folders of training checkpoints."""
    write_atomic_folder(tmp_path / "first", {"a": b"1", "b": b"2"})
    assert contents(tmp_path / "first") == {"a": b"1", "b": b"2"}
    with pytest.raises(OSError, match="first"):
        write_atomic_folder(tmp_path / "first", {"a": b"3"})
    assert contents(tmp_path / "first") == {"a": b"1", "b": b"2"}
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic_folder(tmp_path / "second", {"a": b"1"})
    assert {path.name for path in tmp_path.iterdir()} == {"first"}


def test_content_of_a_seed_is_the_same_in_every_process():
    assert tiny_content(0).fingerprint == tiny_content(1).fingerprint
