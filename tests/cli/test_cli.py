"""The lpt-peft command, called as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import lpt_peft
from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones import listing as catalog
from lpt_peft.cli import main
from lpt_peft.errors import LPTError
from tests.conftest import tiny_vit


def test_doctor_tells_what_would_be_attached(capsys):
    assert main(["doctor", "vit_tiny_patch16_224"]) == 0
    out = capsys.readouterr().out
    assert "12 x Attention, 12 x Block" in out
    assert "shared.prompts 23,040" in out
    assert "mean [0.5, 0.5, 0.5]" in out


def test_doctor_json(capsys):
    assert main(["doctor", "vit_tiny_patch16_224", "--json", "--num-classes", "7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["supported"] is True
    assert report["learnt_parameters"]["group"] == {
        "pool.prompts": 20 * 6 * 10 * 192,
        "pool.keys": 20 * 192,
        "head.weight": 7 * 192,
    }
    assert report["prompt_share"] == pytest.approx(report["prompt_parameters"] / report["frozen_parameters"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformers/dinov2", "12 x Dinov2Layer"),
        ("torchvision/vit_b_32", "12 x EncoderBlock"),
        ("open_clip/ViT-B-32", "12 x ResidualAttentionBlock"),
        ("timm/eva02_tiny_patch14_224", "12 x EvaAttention, 12 x EvaBlock"),
        ("vit_base_patch16_plus_240", "timm has no weights under this name"),
    ],
)
def test_doctor_knows_every_library(capsys, name, words):
    assert main(["doctor", name]) == 0
    assert words in capsys.readouterr().out


def test_doctor_lists_by_pattern(capsys):
    assert main(["doctor", "--list", "*beit_base_patch16_2*"]) == 0
    streams = capsys.readouterr()
    assert streams.out == "beit_base_patch16_224: yes\n"
    assert streams.err.endswith("1 of 1 take prompts.\n")
    assert main(["doctor", "--list", "swin_[st]", "--json"]) == 0
    report = {line["name"]: line["answer"] for line in json.loads(capsys.readouterr().out)}
    assert report.keys() == {"torchvision/swin_s", "torchvision/swin_t"}
    assert all("SwinTransformer cannot take prompts" in answer for answer in report.values())
    assert main(["doctor", "--list", "nope"]) == 1
    assert 'fits "nope"; try "*nope*"' in capsys.readouterr().err
    assert main(["doctor"]) == 1
    assert "needs the name of a backbone" in capsys.readouterr().err


def test_doctor_lists_families_without_a_pattern(capsys, monkeypatch):
    some = [entry for entry in catalog.entries() if entry.name in {"test_vit", "test_vit2", "resnet18", "alexnet"}]
    monkeypatch.setattr(catalog, "entries", lambda: iter(some))
    assert main(["doctor", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "timm, vision_transformer: 2 models such as test_vit: yes"
    assert lines[1].startswith("timm, resnet: 1 models such as resnet18: timm's ResNet cannot take prompts")
    assert lines[2].startswith("torchvision, ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "ResNet cannot take prompts: it has no attention over tokens"),
        ("vit_tiny_patch16_2244", "No installed library has a model"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
    ],
)
def test_doctor_says_why_not(capsys, name, words):
    assert main(["doctor", name]) == 1
    streams = capsys.readouterr()
    assert words in streams.err
    assert streams.out == ""
    with pytest.raises(SystemExit) as stop:
        main(["doctor", name, "--json"])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["supported"] is False
    assert words in report["reason"]


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


def test_wrong_arguments_are_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctr"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "doctor", "inspect"))


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "lpt_peft", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs the name of a backbone" in done.stderr


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"])
def test_doctor_takes_names_with_the_tag_of_weights(name, capsys):
    assert main(["doctor", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 12
    assert main(["doctor", "vit_tiny_patch16_224.nonsense"]) == 1
    assert main(["doctor", "--list", "timm/vit_tiny_patch16_22*"]) == 0
    assert "vit_tiny_patch16_224: yes" in capsys.readouterr().out


ESCAPE = "\x1b[2J\x1b[1;1HAll checks passed\nfingerprint 0\x9b"


def test_a_hostile_name_does_not_reach_the_terminal(tmp_path, capsys):
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    names = [ESCAPE, *"abcdef"]
    adapter.save_pretrained(tmp_path, label_names=names)
    for words in (["inspect", str(tmp_path)], ["inspect", str(tmp_path), "--json"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert not any(line.startswith("fingerprint") for line in out.splitlines())
    assert json.loads(out)["head"]["label_names"] == names


def test_errors_of_the_disk_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "file" / "below")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("lpt-peft: [Errno 20]")
    assert err.count("\n") == 1


@pytest.mark.parametrize("source", ["a" * 300, "a\0b", "/" + "a" * 300, "loop"])
def test_sources_that_no_system_opens(tmp_path, monkeypatch, source):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "config.json").symlink_to(tmp_path / "loop" / "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LPTError):
        LongTailPromptAdapter.from_pretrained(source, tiny_vit())


HEAVY = ("accelerate", "huggingface_hub", "matplotlib", "numpy", "open_clip", "PIL", "safetensors", "sklearn", "timm")
HEAVY += ("torch", "torchvision", "transformers")
COMMANDS = ("convert", "demo", "doctor", "evaluate", "inspect", "predict", "pull", "push", "train")


def modules_after(*words):
    """Top-level packages that a process has imported when the command has answered, and its output."""
    program = (
        "import sys\n"
        "from lpt_peft.cli import main\n"
        "try:\n"
        f"    status = main({list(words)!r})\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()), done.stdout


def test_version_needs_no_library_at_all():
    modules, out = modules_after("--version")
    assert out == f"lpt-peft {lpt_peft.__version__}\n"
    assert not modules & {*HEAVY, "rich", "tyro"}


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_what_needs_it(words):
    modules, out = modules_after(*words)
    assert not modules & set(HEAVY)
    if words == ["--help"]:
        assert all(command in out for command in (*COMMANDS, "--version"))
    else:
        assert f"usage: lpt-peft {words[0]}" in out


def test_the_help_of_train_shows_defaults_of_a_preset():
    modules, out = modules_after("train", "--preset", "inat2018", "--help")
    assert "skips the phase. (default: 80)" in out
    assert not modules & set(HEAVY)


def test_a_command_imports_only_its_own_libraries(folder):
    modules, out = modules_after("inspect", str(folder))
    assert "All checks passed" in out
    assert not modules & {"accelerate", "matplotlib", "open_clip", "sklearn", "transformers"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion(shell):
    modules, script = modules_after("--tyro-print-completion", shell)
    assert all(command in script for command in COMMANDS)
    assert "--shot-rule" in script
    assert not modules & set(HEAVY)


def test_bash_completes_commands_and_options(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    _, script = modules_after("--tyro-print-completion", "bash")
    (tmp_path / "completion").write_text(script)
    program = (
        f"source {tmp_path / 'completion'}\n"
        "function=$(complete -p lpt-peft | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        'answer() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $function; echo ${COMPREPLY[@]}; }\n'
        "answer lpt-peft e\n"
        "answer lpt-peft train --shot\n"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["evaluate", "--shot-rule"]
