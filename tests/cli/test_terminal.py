"""Streams of the command: encodings, pipes, full disks, narrow terminals; in real processes where that matters."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft.cli import main
from lpt_peft.cli.common.streams import dump_json, replace_unprintable
from lpt_peft.cli.common.tables import print_table
from tests.data.make import write_png

COMMAND = [sys.executable, "-m", "lpt_peft"]
COMMANDS = ("check", "convert", "demo", "doctor", "evaluate", "export", "inspect", "predict", "pull", "push", "train")


def call(*words, stdin=None, cwd=None, **environment):
    """Run the command in a new process; bytes of both streams."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        input=stdin,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


TEXT = st.text(st.characters(exclude_categories=()))  # with surrogates, as in file names of another encoding


@given(st.recursive(TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "shift_jis", "koi8-r"])
def test_json_is_valid_in_every_encoding(encoding, content):
    buffer = BytesIO()
    stream = TextIOWrapper(buffer, encoding=encoding)
    replace_unprintable(stream)
    original, sys.stdout = sys.stdout, stream
    try:
        print(dump_json(content, indent=2))
        stream.flush()
    finally:
        sys.stdout = original
    text = buffer.getvalue().decode(encoding)
    assert json.loads(text) == content
    assert all(character.isprintable() or character == "\n" for character in text)


def test_json_in_utf8_stays_readable(capsys):
    assert main(["doctor", "--list", "no model"]) == 1
    assert "日本" in dump_json(["日本"])


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_reader_of_the_output_has_gone(stream):
    """`lpt-peft --help | head -0` writes into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    words = ["--help"] if stream == "stdout" else ["doctr"]
    done = subprocess.run([*COMMAND, *words], **streams, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert not done.stdout
    assert not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_a_message():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "lpt-peft: No space left on device. Free some space, or choose another disk.\n"


def on_terminal(columns, *words):
    """Run the command on a terminal of that many columns; what it shows."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    process = subprocess.Popen([*COMMAND, *words], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    found = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux: the other side was closed
            part = b""
        if not part:
            break
        found += part
    os.close(leader)
    process.wait()
    return re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).replace("\r\n", "\n")


def words_of(text):
    return set(re.findall(r"[^\s,{}─-╿]+", text))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_narrow_terminals_break_no_words(command):
    """At 60 columns no line of the help is longer, and each of its words is a word of the help at 200 columns."""
    words = [command, "--help"] if command else ["--help"]
    wide, narrow = (on_terminal(columns, *words) for columns in (200, 60))
    assert not [line for line in narrow.splitlines() if len(line) > 60]
    assert not words_of(narrow) - words_of(wide), "broken words"
    assert len(words_of(narrow)) > 20


def test_narrow_terminals_break_no_words_of_messages_and_reports(tmp_path):
    message = on_terminal(60, "doctor", "vit_base_patch16_2244")
    assert "Similar names: vit_base_patch16_224" in " ".join(message.split())
    report = on_terminal(60, "doctor", "vit_tiny_patch16_224")
    assert "mean [0.5, 0.5, 0.5]" in " ".join(report.split())
    write_png(tmp_path / "a class with a name of several words" / "1.png", 0)
    write_png(tmp_path / "another class with a name of several words" / "1.png", 0)
    (tmp_path / "a class with a name of several words" / "notes of several words.txt").write_text("text")
    check = on_terminal(60, "check", str(tmp_path))
    assert "notes of several words.txt" in " ".join(check.split())
    check = "\n".join(line for line in check.splitlines() if "image/s" not in line and str(tmp_path) not in line)
    for text in (message, report, check):
        assert len(text.splitlines()) > 2
        assert not [line for line in text.splitlines() if len(line) > 60]


def test_a_wide_table_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    header, rows = ("%", "overall", "many"), [("test", "12.00", "-"), ("a [long] name of " + "x" * 80, "1", "2")]
    monkeypatch.setenv("COLUMNS", "200")
    print_table(rows, header)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert (
        len({line.index(value) + len(value) for line, value in zip(lines, ("overall", "12.00", "1"), strict=True)}) == 1
    )
    monkeypatch.setenv("COLUMNS", "60")
    print_table(rows, header)
    assert capsys.readouterr().out.splitlines() == [
        "test",
        "  overall: 12.00",
        "  many: -",
        rows[1][0],
        "  overall: 1",
        "  many: 2",
    ]
    print_table([("a\nb\x1b[2J", "x" * 90)])
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[2J\n  " + "x" * 90 + "\n"
