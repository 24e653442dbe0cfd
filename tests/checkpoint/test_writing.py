"""Writing of prompt files: complete or not at all, beside readers, and never over another library's files."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft._files import write_atomic
from lpt_peft.checkpoint import decode, read_prompt_file
from lpt_peft.checkpoint.files import MAX_COPY_BYTES, write_files
from lpt_peft.errors import ConfigError, LPTError, PromptFileExistsError, PromptFileFormatError
from tests.checkpoint.adapters import NAMES, contents, tiny_adapter, tiny_content, tiny_encoded
from tests.conftest import tiny_vit

FOREIGN = {
    "of transformers": b'{"model_type": "vit", "hidden_size": 24}',
    "of PEFT": b'{"peft_type": "LORA", "format": "pt"}',
    "a list": b'["lpt_peft-prompts"]',
    "damaged": b'{"format": "lpt_peft-prompts", ',
    "empty": b"",
    "binary": bytes(range(256)),
    "of another format": b'{"format": "lpt_peft-runs"}',
}


def write_files_of(folder, seed):
    encoded = tiny_encoded(seed)
    write_files(folder, encoded.weights, encoded.copy)


def is_of(folder, seed):
    return (folder / "prompts.safetensors").read_bytes() == tiny_encoded(seed).weights


# -- ordinary folders -------------------------------------------------------------------------------------


def test_files_with_the_same_content_are_not_touched(tmp_path):
    tiny_adapter().save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    tiny_adapter().save_pretrained(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "README.md").write_text("text")
    tiny_adapter(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "text"
    assert contents(tmp_path).keys() == NAMES | {"README.md"}


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    tiny_adapter().save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_folders_are_created_and_links_are_followed(tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "deep" / "blobs")
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        (links / name).symlink_to(tmp_path / "deep" / "blobs" / name)
    (tmp_path / "folder").symlink_to(links, target_is_directory=True)
    for folder in (links, tmp_path / "folder", str(tmp_path / "folder")):
        assert read_prompt_file(folder).fingerprint == tiny_content().fingerprint


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    """The target may be a store that others read, such as the Hub client's cache."""
    (tmp_path / "store").mkdir()
    write_files_of(tmp_path / "store", 0)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "prompts.safetensors").symlink_to(tmp_path / "store" / "prompts.safetensors")
    write_files_of(folder, 1)
    assert is_of(folder, 1)
    assert not (folder / "prompts.safetensors").is_symlink()
    assert is_of(tmp_path / "store", 0)


def test_a_subfolder(tmp_path):
    tiny_adapter().save_pretrained(tmp_path, subfolder="prompts/places")
    assert contents(tmp_path / "prompts" / "places").keys() == NAMES
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit(), subfolder="prompts/places")
    assert torch.equal(loaded.head.weight, tiny_adapter().head.weight)
    for wrong in ("../x", "/x", "", "a//b"):
        with pytest.raises(ConfigError, match="inside the folder or repository"):
            tiny_adapter().save_pretrained(tmp_path, subfolder=wrong)


@pytest.mark.parametrize("tail", [(), ("deeper",)])
def test_a_file_in_place_of_the_folder(tmp_path, tail):
    (tmp_path / "run").write_text("text")
    with pytest.raises(ConfigError, match="must be a folder, but .*run is a file. Choose another folder") as caught:
        tiny_adapter().save_pretrained(tmp_path.joinpath("run", *tail))
    assert "Errno" not in str(caught.value)
    assert (tmp_path / "run").read_text() == "text"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    write_files_of(tmp_path, 0)
    tmp_path.chmod(0o500)
    try:
        tiny_adapter().save_pretrained(tmp_path)  # nothing to write
        with pytest.raises(PermissionError, match=r"prompts\.safetensors"):
            tiny_adapter(seed=1).save_pretrained(tmp_path)
        assert is_of(tmp_path, 0)
        assert contents(tmp_path).keys() == NAMES
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_that_are_not_regular_files_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(PromptFileFormatError, match="not a regular file"):
        tiny_adapter().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# -- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_the_config_of_another_library_is_never_overwritten(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    before = contents(tmp_path)
    with pytest.raises(PromptFileExistsError, match='does not belong to a prompt file.*subfolder="prompts"') as caught:
        tiny_adapter().save_pretrained(tmp_path)
    assert isinstance(caught.value, LPTError)
    assert isinstance(caught.value, FileExistsError)
    assert contents(tmp_path) == before
    tiny_adapter().save_pretrained(tmp_path, subfolder="prompts")  # as the message says
    LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit(), subfolder="prompts")
    assert contents_of_files(tmp_path) == before


def contents_of_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_huge_config_of_another_library_is_not_parsed(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * MAX_COPY_BYTES + b'{"format": "lpt_peft-prompts"}')
    with pytest.raises(PromptFileExistsError):
        tiny_adapter().save_pretrained(tmp_path)


def test_a_model_saved_over_a_prompt_file_is_found(tmp_path):
    """transformers overwrites our copy; the prompts still load, and saving refuses to overwrite it in turn."""
    tiny_adapter().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(FOREIGN["of transformers"])
    LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit())
    with pytest.raises(PromptFileExistsError):
        tiny_adapter(seed=1).save_pretrained(tmp_path)
    assert is_of(tmp_path, 0)


@pytest.mark.parametrize(
    "copy",
    [None, b"", b"{", b'{"format": "lpt_peft-prompts", "head": {}}', b'{"model_type": "vit"}'],
    ids=["missing", "empty", "damaged", "other", "of transformers"],
)
def test_loading_does_not_depend_on_the_copy(tmp_path, copy):
    tiny_adapter().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if copy is not None:
        (tmp_path / "config.json").write_bytes(copy)
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit())
    assert torch.equal(loaded.head.weight, tiny_adapter().head.weight)


def test_the_copy_of_an_older_save_is_written_again(tmp_path):
    write_files_of(tmp_path, 0)
    (tmp_path / "config.json").write_bytes(json.dumps({"format": "lpt_peft-prompts", "format_version": 1}).encode())
    write_files_of(tmp_path, 0)
    assert (tmp_path / "config.json").read_bytes() == tiny_encoded(0).copy


# -- faults -----------------------------------------------------------------------------------------------


class Fault:
    """Passes calls on to `call`; the n-th raises `error`, after the call if `late`, else instead of it."""

    def __init__(self, call, nth, error, late=False):
        self.call, self.left, self.error, self.late = call, nth, error, late

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == 0 and not self.late:
            raise self.error
        answer = self.call(*arguments)
        if self.left == 0:
            raise self.error
        return answer


# For each of the two files: opened, flushed, replaced, folder flushed.
@pytest.mark.parametrize(
    ("step", "nth", "late", "seed"),
    [
        *(("open", 1, False, 0), ("fsync", 1, False, 0), ("replace", 1, False, 0)),
        *(("replace", 1, True, 1), ("fsync", 2, False, 1), ("open", 2, False, 1), ("fsync", 3, False, 1)),
        *(("replace", 2, False, 1), ("replace", 2, True, 1), ("fsync", 4, False, 1)),
    ],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failed_write_leaves_the_old_prompts_or_the_new(tmp_path, monkeypatch, step, nth, late, seed, error):
    write_files_of(tmp_path, 0)
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", Fault(os.fsync, nth, error))
        else:
            fault = Fault(getattr(Path, step), nth, error, late)
            patch.setattr(Path, step, lambda *arguments: fault(*arguments))
        with pytest.raises(type(error)):
            write_files_of(tmp_path, 1)
    assert contents(tmp_path).keys() == NAMES
    assert is_of(tmp_path, seed)
    read_prompt_file(tmp_path)
    write_files_of(tmp_path, 1)
    assert contents(tmp_path) == dict(zip(sorted(NAMES), reversed(tiny_encoded(1)[:2]), strict=True))


def test_a_failed_first_write_leaves_nothing(tmp_path, monkeypatch):
    fault = Fault(Path.replace, 1, OSError(5, "Input/output error"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: fault(*paths))
        with pytest.raises(OSError, match="Input/output error"):
            tiny_adapter().save_pretrained(tmp_path)
    assert contents(tmp_path) == {}


def test_an_atomic_write_of_any_file(tmp_path):
    write_atomic(tmp_path / "a" / "b", b"1")
    write_atomic(tmp_path / "a" / "b", b"22")
    assert contents(tmp_path / "a") == {"b": b"22"}


# -- readers beside writers -------------------------------------------------------------------------------


def test_readers_in_threads_see_complete_files(tmp_path):
    expected = [decode(tiny_encoded(seed).weights) for seed in (0, 1)]
    write_files_of(tmp_path, 0)
    stop = threading.Event()

    def write():
        turn = 0
        while not stop.is_set():
            turn += 1
            write_files_of(tmp_path, turn % 2)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        end = time.monotonic() + 20.0
        while time.monotonic() < end and seen != {0, 1}:
            for _ in range(50):
                found = read_prompt_file(tmp_path)
                same = [
                    torch.equal(found.tensors["head.weight"], content.tensors["head.weight"]) for content in expected
                ]
                seen.add(same.index(True))
                content = expected[same.index(True)]
                assert all(torch.equal(tensor, content.tensors[name]) for name, tensor in found.tensors.items())
    finally:
        stop.set()
        writer.join()
    assert seen == {0, 1}


def read_until_stopped(folder, results):
    """Read until a file named `stop` appears; runs in another process and reports its first read and the count."""
    path, reads = Path(folder) / "prompts.safetensors", 0
    while not (Path(folder) / "stop").exists():
        if path.read_bytes() not in [tiny_encoded(seed).weights for seed in (0, 1)]:
            raise AssertionError("neither the old file nor the new")
        read_prompt_file(folder)
        reads += 1
        if reads == 1:
            results.put("started")
    results.put(reads)


@pytest.mark.slow
def test_readers_in_other_processes_see_complete_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    write_files_of(tmp_path, 0)
    readers = [context.Process(target=read_until_stopped, args=(str(tmp_path), results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=120) for _ in readers] == ["started"] * 2
    for turn in range(500):
        write_files_of(tmp_path, turn % 2)
    (tmp_path / "stop").touch()
    counts = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert min(counts) > 10
