"""Flags and arguments that a sub-command does not have."""

from __future__ import annotations

import inspect

import pytest

from lpt_peft.cli import _commands, main
from lpt_peft.cli.common.parsing import _flags, _keywords

TRAIN = ["train", "no data", "--output", "no run", "--backbone", "no model"]
UNKNOWN = [
    (
        [*TRAIN, "--learning-rate", "3"],
        "train has no flag --learning-rate. Did you mean --shared.learning-rate or --group.learning-rate? All flags: "
        "lpt-peft train --help.\n",
    ),
    (
        [*TRAIN, "--epoch=3", "--xyz", "--bacth_size", "3"],
        "train has no flag --epoch. Did you mean --shared.epochs or --group.epochs?\nlpt-peft: train has no flag --xyz."
        "\nlpt-peft: train has no flag --bacth_size. Did you mean --batch-size? All flags: lpt-peft train --help.\n",
    ),
    (["predict", "no run", "a.png", "--fromat", "csv"], "predict has no flag --fromat. Did you mean --format? All"),
    (["evaluate", "no run", "--crop", "5"], "evaluate has no flag --crop. Did you mean --crops? All flags"),
    (["evaluate", "no run", "--jsno"], "evaluate has no flag --jsno. Did you mean --json? All flags"),
    (["demo", "no folder"], "Unexpected argument 'no folder': see lpt-peft demo --help.\n"),
]


@pytest.mark.parametrize(("words", "message"), UNKNOWN)
def test_unknown_words_are_named_in_one_line_each(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"lpt-peft: {message}")
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_suggested_flags_are_those_of_the_help(capsys):
    """Every flag that may be suggested is in the help of its sub-command, and the other way round."""
    for name, command in _commands([]).items():
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        printed = capsys.readouterr().out
        flags = set(_flags(_keywords(command)))
        assert flags, name
        assert {flag for flag in flags if flag not in printed} == set(), name
        assert len(flags) >= len(inspect.signature(command).parameters) - 2


def test_wrong_values_keep_the_message_of_tyro(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TRAIN, "--seed", "x"])
    assert "--seed" in capsys.readouterr().err
