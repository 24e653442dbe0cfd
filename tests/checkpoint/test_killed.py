"""Writers that are killed: whoever reads beside them or after them finds the old pair or the new, never a mixture."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import WEIGHTS_NAME, encode, files, read_pair, read_prompt_file, save_prompts
from lpt_peft.checkpoint.files import CONFIG_NAME, left_configs, write_pair
from lpt_peft.errors import PromptFileIntegrityError, PromptFileNotFoundError
from tests.conftest import tiny_vit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WRITERS = 200


@cache
def pair(seed):
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), prompt_length=2, pool_size=3)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    return encode(adapter, training={"seed": seed, "of another length": "x" * (50 * seed)})


def forked(work):
    """Run `work` in a child; its exit status is 0 if nothing was raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_200_killed_writers_beside_readers(tmp_path, monkeypatch):
    pairs = [pair(seed) for seed in range(4)]
    write_pair(tmp_path, *pairs[0])

    def read_until_told():
        while not (tmp_path / "stop").exists():
            if read_pair(tmp_path) not in pairs:
                os._exit(3)
            read_prompt_file(tmp_path)

    def write_for_ever(own, told):
        for count in itertools.count():
            write_pair(tmp_path, *pairs[own[count % 2]])
            os.write(told, b".")

    readers = [forked(read_until_told) for _ in range(2)]
    moment = random.Random(0)
    start = time.perf_counter()
    write_pair(tmp_path, *pairs[0])
    save = time.perf_counter() - start  # of this machine, as busy as it is
    seen = set()
    for number in range(WRITERS):
        own = (0, 1) if number % 4 < 2 else (2, 3)
        hear, tell = os.pipe()
        writer = forked(lambda own=own, tell=tell: write_for_ever(own, tell))
        os.close(tell)
        if number % 2:
            assert os.read(hear, 1)  # one save is done: another one is under way
        time.sleep(3 * save * moment.random())
        os.kill(writer, signal.SIGKILL)
        assert ended(writer) == -signal.SIGKILL
        os.close(hear)
        found = read_pair(tmp_path)
        assert found in pairs
        if number % 2:
            assert pairs.index(found) in own
        seen.add(pairs.index(found))
    (tmp_path / "stop").touch()
    assert [ended(reader) for reader in readers] == [0, 0]
    assert {place // 2 for place in seen} == {0, 1}
    # A save leaves nothing of the dead behind, once an hour has passed.
    monkeypatch.setattr(files, "_LEFT_SECONDS", -1.0)
    write_pair(tmp_path, *pair(9))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "stop"}
    assert read_pair(tmp_path) == pair(9)


STEPS = 12  # calls that change the folder in one save; the last tests show that there are no more


def dies_before(step):
    """In a child: the file system calls of a save, up to the one that is never made."""
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


@pytest.mark.parametrize("first", ["whole", "nothing", "interrupted"])
@pytest.mark.parametrize("step", range(STEPS))
def test_killed_at_every_step(tmp_path, monkeypatch, step, first):
    monkeypatch.setattr(files, "_LEFT_SECONDS", -1.0)
    old, new = pair(1), pair(2)

    def save(last, step):
        dies_before(step)
        write_pair(tmp_path, *last)

    if first != "nothing":
        write_pair(tmp_path, *old)
    if first == "interrupted":  # config.json is put aside already, by another writer that was killed
        assert ended(forked(lambda: save(pair(3), 3))) == -signal.SIGKILL
        assert not (tmp_path / CONFIG_NAME).exists()
        assert read_pair(tmp_path) == old
    ended(forked(lambda: save(new, step)))
    if first == "nothing" and not (tmp_path / WEIGHTS_NAME).exists():
        with pytest.raises(PromptFileNotFoundError):
            read_pair(tmp_path)
    else:
        assert read_pair(tmp_path) in (old, new)
    # Saving goes on from there, and tidies up.
    write_pair(tmp_path, *pair(4))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    assert read_pair(tmp_path) == pair(4)


def test_no_save_takes_more_steps(tmp_path):
    write_pair(tmp_path, *pair(1))

    def save():
        dies_before(STEPS)
        write_pair(tmp_path, *pair(2))

    assert ended(forked(save)) == 0
    assert read_pair(tmp_path) == pair(2)


def test_a_copy_that_belongs_to_other_weights_does_not_stand_in(tmp_path):
    write_pair(tmp_path, *pair(1))
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / f".{CONFIG_NAME}.{'0' * 32}.old").write_bytes(pair(2)[0])
    (tmp_path / f".{CONFIG_NAME}.{'1' * 32}.new").write_bytes(b"broken")
    (tmp_path / f".{CONFIG_NAME}.mine").write_bytes(pair(1)[0])  # not a name of ours
    with pytest.raises(PromptFileNotFoundError, match=r"config\.json does not exist"):
        read_pair(tmp_path)
    (tmp_path / f".{CONFIG_NAME}.{'2' * 32}.old").write_bytes(pair(1)[0])
    assert read_pair(tmp_path) == pair(1)
    assert len(left_configs(tmp_path)) == 3


def test_copies_are_not_looked_at_where_config_json_is_there(tmp_path):
    write_pair(tmp_path, *pair(1))
    (tmp_path / f".{CONFIG_NAME}.{'0' * 32}.old").write_bytes(pair(1)[0])
    (tmp_path / CONFIG_NAME).write_bytes(pair(2)[0])
    with pytest.raises(PromptFileIntegrityError):
        read_pair(tmp_path)


def test_no_more_than_64_copies_are_read(tmp_path):
    write_pair(tmp_path, *pair(1))
    (tmp_path / CONFIG_NAME).unlink()
    for number in range(90):
        (tmp_path / f".{CONFIG_NAME}.{number:032x}.old").write_bytes(b"{}")
    assert len(left_configs(tmp_path)) == 64
    with pytest.raises(PromptFileNotFoundError):
        read_pair(tmp_path)


def test_what_another_writer_may_still_need_stays(tmp_path):
    young = tmp_path / f".{CONFIG_NAME}.{'0' * 32}.new"
    young.write_bytes(pair(2)[0])
    write_pair(tmp_path, *pair(1))
    assert young.exists()


def test_a_users_hidden_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LEFT_SECONDS", -1.0)
    names = {".config.json.swp", ".prompts.safetensors.0.new", ".git", f".{CONFIG_NAME}.{'0' * 32}.new~"}
    for name in names:
        (tmp_path / name).write_text("mine")
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    save_prompts(adapter, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names | {CONFIG_NAME, WEIGHTS_NAME}
