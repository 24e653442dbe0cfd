"""The helper that starts other processes: results, failures, signals and time limits."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.processes import Child, run_ranks, wait_until


def rank_and_sum(offset):
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 fails")
    dist.barrier()  # never completed: rank 1 does not arrive


def initialized():
    return dist.is_initialized(), os.environ["RANK"]


def hang(path):
    path.touch()
    print("hanging", flush=True)
    while True:
        time.sleep(60)


def test_ranks_form_a_group_and_return_values():
    assert run_ranks(rank_and_sum, 5) == [(0, 11.0), (1, 11.0)]


def test_ranks_may_initialize_the_group_later():
    assert run_ranks(initialized, init=False) == [(False, "0"), (False, "1")]


def test_a_failed_rank_ends_the_others_and_shows_its_output():
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)a rank failed.*ValueError: rank 1 fails"):
        run_ranks(fail_on_rank_1)
    assert time.monotonic() - started < 200, "waited for the barrier"


def test_ranks_that_hang_are_killed(tmp_path):
    with pytest.raises(AssertionError, match=r"not finished after 0\.1 s"):
        run_ranks(hang, tmp_path / "started", timeout=0.1)


def test_a_child_is_killed_by_a_signal(tmp_path):
    with Child(hang, tmp_path / "started") as child:
        wait_until((tmp_path / "started").exists)
        child.kill(signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
        with pytest.raises(AssertionError, match=r"(?s)exit code -15.*hanging"):
            child.result()


def test_a_child_that_was_left_running_is_killed_at_the_end(tmp_path):
    with Child(hang, tmp_path / "started") as child:
        pass
    assert child.exit_code == -signal.SIGKILL


def test_waiting_ends_with_the_condition_or_the_time():
    states = iter([False, False, True])
    wait_until(lambda: next(states))
    assert next(states, None) is None
    with pytest.raises(AssertionError, match=r"not true after 0\.05 s"):
        wait_until(lambda: False, timeout=0.05)
