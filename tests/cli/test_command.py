"""The lpt-peft command: arguments, imports, streams."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import lpt_peft
from lpt_peft.cli import main


def test_wrong_arguments_are_explained(capsys):
    assert main(["doctr"]) == 2
    assert 'no sub-command "doctr". Did you mean doctor?' in capsys.readouterr().err
    assert main(["xyz"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean" not in err
    assert all(command in err for command in COMMANDS)
    with pytest.raises(SystemExit) as stop:
        main(["predict"])
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


def test_errors_of_the_file_system_have_a_cure(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert main(["demo", "--output", str(tmp_path / "file" / "below")]) == 1
    cure = "A file is in the place of a folder: choose another path."
    assert capsys.readouterr().err == f"lpt-peft: {tmp_path / 'file' / 'below'}: Not a directory. {cure}\n"
    assert main(["demo", "--output", str(tmp_path / "file")]) == 1
    cure = "Remove it, or choose another path."
    assert capsys.readouterr().err == f"lpt-peft: {tmp_path / 'file'}: File exists. {cure}\n"


# torch, and libraries that import it or take as long
HEAVY = ("accelerate", "huggingface_hub", "matplotlib", "numpy", "open_clip", "PIL", "safetensors", "sklearn", "timm")
HEAVY += ("torch", "torchvision", "transformers")
COMMANDS = (
    "analyse",
    "check",
    "convert",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "predict",
    "pull",
    "push",
    "train",
)


def modules_after(*words):
    """Run the command in a new process; return the top-level packages that it imported, and its output."""
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


def test_version_imports_no_library():
    modules, out = modules_after("--version")
    assert out == f"lpt-peft {lpt_peft.__version__}\n"
    assert not modules & {*HEAVY, "rich", "tyro"}


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_does_not_import_torch(words):
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


def test_a_command_imports_only_its_own_libraries(run):
    modules, out = modules_after("inspect", str(run / "prompts"))
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
        "answer lpt-peft ev\n"
        "answer lpt-peft train --shot\n"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["evaluate", "--shot-rule"]
