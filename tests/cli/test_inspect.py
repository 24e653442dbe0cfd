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
REORDER = "\u202eAll checks passed\u2028fingerprint 0"


def test_text_of_the_file_cannot_control_the_terminal(tmp_path, capsys):
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    names = [REORDER, *"abcdef"]
    adapter.save_pretrained(tmp_path, label_names=names, training={"note": ESCAPE})
    for words in (["inspect", str(tmp_path)], ["inspect", str(tmp_path), "--json"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert not any(line.startswith("fingerprint") for line in out.splitlines())
    assert json.loads(out)["head"]["label_names"] == names
    assert json.loads(out)["training"] == {"note": ESCAPE}


def test_names_of_every_script_are_printed(tmp_path, capsys):
    names = ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u5c71\u7530\u3000\u592a\u90ce", *"abcde"]
    LongTailPromptAdapter.wrap(tiny_vit()).save_pretrained(tmp_path, label_names=names)
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"{names[0]}, {names[1]}, a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("copy", "words"),
    [
        (None, "config.json is missing"),
        ("{", "config.json cannot be read"),
        ('{"model_type": "vit"}', "config.json differs in backbone, class_counts,"),
    ],
)
def test_a_different_copy_is_reported(folder, capsys, copy, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))  # other white space only
    assert main(["inspect", str(folder)]) == 0
    assert "config.json" not in capsys.readouterr().out
    config["training"]["metrics"]["few"] = 0.9
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(folder)]) == 0
    assert "config.json differs in training; it is only a copy" in capsys.readouterr().out
    (folder / "config.json").unlink()
    if copy is not None:
        (folder / "config.json").write_text(copy)
    assert main(["inspect", str(folder)]) == 0
    assert words in capsys.readouterr().out


def test_the_output_folder_of_a_run(folder, capsys):
    run = folder.parent  # with its prompt file in prompts/
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "config.json").read_text())
    assert main(["inspect", str(run.parent), "--subfolder", run.name]) == 0
    capsys.readouterr()
    (run / "settings.json").write_text("{}")
    folder.rename(run / "elsewhere")
    assert main(["inspect", str(run)]) == 1
    assert "holds no result yet" in capsys.readouterr().err


def test_a_file_in_place_of_a_folder(folder, capsys):
    assert main(["inspect", str(folder / "prompts.safetensors")]) == 0
    assert "All checks passed" in capsys.readouterr().out
    assert main(["inspect", str(folder / "config.json")]) == 1
    message = capsys.readouterr().err
    assert "config.json is a file: give its folder" in message
    assert "Errno" not in message
