"""lpt-peft inspect."""

from __future__ import annotations

import json

import pytest

from lpt_peft import LongTailPromptAdapter
from lpt_peft.cli import main
from tests.conftest import tiny_vit


@pytest.fixture
def folder(tmp_path):
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3)
    adapter.phase = "group"
    adapter.save_pretrained(
        tmp_path / "prompts",
        class_counts=[100, 20, 5],
        label_names=["cat", "dog", "emu"],
        training={"rule": "mean over classes", "metrics": {"few": 0.5}},
    )
    return tmp_path / "prompts"


def test_inspect(capsys, folder):
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for words in ("phase group", "VisionTransformer", "pool.prompts", "cat", "100", "fingerprint", "few"):
        assert words in out, words


def test_inspect_json_is_the_config(capsys, folder):
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "config.json").read_text())


def test_inspect_refuses_a_broken_file(capsys, folder, tmp_path):
    weights = folder / "prompts.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["inspect", str(folder)]) == 1
    assert "prompts.safetensors" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


ESCAPE = "\x1b[2J\x1b[1;1HAll checks passed\nfingerprint 0\x9b"


def test_class_names_cannot_control_the_terminal(tmp_path, capsys):
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    names = [ESCAPE, *"abcdef"]
    adapter.save_pretrained(tmp_path, label_names=names)
    for words in (["inspect", str(tmp_path)], ["inspect", str(tmp_path), "--json"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert not any(line.startswith("fingerprint") for line in out.splitlines())
    assert json.loads(out)["head"]["label_names"] == names
