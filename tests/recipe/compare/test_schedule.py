"""Cells in processes: failures, Ctrl-C, a killed comparison, GPUs and threads; their records and the lock."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe.compare import schedule
from lpt_peft.recipe.compare.cells import Cell, measured, measuring
from lpt_peft.recipe.compare.lock import locked
from lpt_peft.recipe.compare.schedule import run_cells
from lpt_peft.recipe.resume.interrupt import Interruption
from tests.processes import Child, wait_until


def cells(folder, names):
    return [Cell(name, 0, folder / name) for name in names]


def succeed_or_fail(cell):
    """Work that depends on the name of the row."""
    print("output of", cell)
    if cell.row == "library":
        raise ConfigError("learning_rate is too high.")
    if cell.row == "bug":
        raise ValueError("a bug")
    if cell.row == "long":
        raise ConfigError("\u00e9" * 1_000_000)
    if cell.row == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    names = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")
    (cell.folder / "environment").write_text(json.dumps({name: os.environ.get(name) for name in names}))


def test_failed_cells_do_not_stop_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    planned = cells(tmp_path, ["library", "bug", "killed", "fine", "long"])
    outcome = run_cells(planned, succeed_or_fail, jobs=2)
    assert dict(os.environ) == before
    assert outcome.finished == [planned[3]]
    errors = {cell.row: error for cell, error in outcome.failed.items()}
    assert errors["library"] == "learning_rate is too high."
    assert errors["bug"] == "ValueError: a bug"
    assert "ended with signal 9" in errors["killed"]
    assert errors["long"] == "\u00e9" * 10_000, "a longer message would fill the pipe, and the process never end"
    assert "Traceback" in (tmp_path / "bug" / "log.txt").read_text()
    environment = json.loads((tmp_path / "fine" / "environment").read_text())
    assert environment == {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)), "LOCAL_WORLD_SIZE": "2"}
    assert (tmp_path / "fine" / "log.txt").read_text() == "output of fine, seed 0\n"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fine, seed 0: finished" in captured.err
    assert "5 of 5" in captured.err


def work_until_a_signal(cell):
    """A run that saves when it is stopped."""
    (cell.folder / "pid").write_text(str(os.getpid()))
    with Interruption() as interruption:
        while not interruption.requested:
            time.sleep(0.01)
    (cell.folder / "saved").write_text("")
    raise KeyboardInterrupt("saved")


def run_two(folder):
    run_cells(cells(Path(folder), ["a", "b", "c"]), work_until_a_signal, jobs=2)


def alive(folder):
    pid = int((folder / "pid").read_text())
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_saves_its_cells(tmp_path, number):
    with Child(run_two, str(tmp_path)) as child:
        wait_until(lambda: all((tmp_path / name / "pid").exists() for name in "ab"))
        os.kill(child.pid, number)
        assert child.wait() == -signal.SIGINT, child.output
        assert "KeyboardInterrupt: interrupted; 2 cells of 3 were started" in child.output
    for name in "ab":
        assert (tmp_path / name / "saved").exists()
        assert not alive(tmp_path / name)
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_processes_end_with_a_killed_comparison(tmp_path):
    with Child(run_two, str(tmp_path)) as child:
        wait_until(lambda: all((tmp_path / name / "pid").exists() for name in "ab"))
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(tmp_path / name) for name in "ab"), 30)
    assert not any((tmp_path / name / "saved").exists() for name in "ab")


@pytest.mark.parametrize(
    ("visible", "count", "expected"), [("", 0, []), ("", 3, ["0", "1", "2"]), ("4,7", 2, ["4", "7"])]
)
def test_gpus_are_used_in_turn(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = schedule._gpus()
    assert gpus == expected
    found = [schedule._environment(slot, 4, gpus).get("CUDA_VISIBLE_DEVICES") for slot in range(4)]
    assert found == ([None] * 4 if not count else [gpus[slot % count] for slot in range(4)])


def test_threads_of_the_environment_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in schedule._environment(0, 2, [])


# Records


def test_records_add_up_the_time_of_all_attempts(tmp_path):
    assert measured(tmp_path) == measured(tmp_path / "new")
    with suppress(KeyboardInterrupt), measuring(tmp_path, ["test"]):
        time.sleep(0.05)
        raise KeyboardInterrupt
    first = measured(tmp_path)
    assert first["splits"] == []
    assert first["seconds"] >= 0.05
    assert not first["running"]
    with measuring(tmp_path, ["validation", "test"]) as record:
        time.sleep(0.05)
        record["incomplete"] = True
    second = measured(tmp_path)
    assert second["splits"] == ["validation", "test"]
    assert second["seconds"] >= first["seconds"] + 0.05
    assert second["incomplete"]
    assert second["peak_memory_bytes"] > 2**20


def test_time_of_a_killed_attempt_is_unknown(tmp_path):
    context = measuring(tmp_path, ["test"])
    context.__enter__()
    (tmp_path / "copy.json").write_bytes((tmp_path / "cell.json").read_bytes())
    context.__exit__(None, None, None)
    (tmp_path / "copy.json").replace(tmp_path / "cell.json")  # as a kill leaves it
    with measuring(tmp_path, ["test"]):
        pass
    assert measured(tmp_path)["seconds"] is None
    assert measured(tmp_path)["splits"] == ["test"]


@pytest.mark.parametrize("text", ["{", '{"format_version": 1}', '{"format_version": 2}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(StateError, match=r"cell.json"):
        measured(tmp_path)


def test_a_folder_is_locked_by_one_comparison(tmp_path):
    words = "Another lpt-peft compare is running in"
    with locked(tmp_path / "new"), pytest.raises(StateError, match=words), locked(tmp_path / "new"):
        pass
    with locked(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder"), locked(tmp_path / "file"):
        pass
