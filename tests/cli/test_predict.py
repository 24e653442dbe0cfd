"""lpt-peft predict."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.cli import main
from lpt_peft.cli.common import prediction_output
from lpt_peft.cli.common.exit_codes import BROKEN_PIPE
from lpt_peft.cli.common.load_run import load_run
from lpt_peft.cli.common.prediction_output import make_writer
from lpt_peft.inference import Classifier, items
from tests.cli.runs import BACKBONE, NAMES, SMALL, load_adapter

predict_module = import_module("lpt_peft.cli.predict")


def test_predict_names_classes(run, data, capsys):
    images = [str(data / "test" / name / "0.png") for name in NAMES]
    assert main(["predict", str(run), *images, "--json", "--show", "2"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == images
    assert all(len(answer["classes"]) == 2 for answer in answers)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(image))) for image in images]).permute(0, 3, 1, 2)
    adapter = load_adapter(run / "prompts").eval()
    logits = adapter(pixels / 127.5 - 1)  # 32 px, mean and std 0.5
    assert adapter.metadata.temperature not in (None, 1.0), "fitted on the validation split"
    expected = (logits / adapter.metadata.temperature).softmax(1)
    for answer, probabilities in zip(answers, expected, strict=True):
        best = probabilities.argsort(descending=True).tolist()[:2]
        assert [entry["class"] for entry in answer["classes"]] == [NAMES[label] for label in best]
        assert [entry["label"] for entry in answer["classes"]] == best
        found = [entry["probability"] for entry in answer["classes"]]
        assert found == pytest.approx([probabilities[label].item() for label in best], abs=1e-5)
    assert main(["predict", str(run), *images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [answer["classes"][0]["class"] for answer in answers]


def test_images_without_a_probable_class_are_rejected(run, pair_run, data, capsys):
    images = [str(data / "test" / name / "0.png") for name in NAMES]
    assert main(["predict", str(run), *images, "--json"]) == 0
    highest = sorted(answer["classes"][0]["probability"] for answer in json.loads(capsys.readouterr().out))
    between = str((highest[0] + highest[1]) / 2)
    assert main(["predict", str(run), *images, "--json", "--min-probability", between]) == 0
    out, err = capsys.readouterr()
    answers = json.loads(out)
    assert sorted(answer["classes"][0]["probability"] for answer in answers if answer["rejected"]) == highest[:1]
    assert "1 of 3 images rejected: no class has a probability of" in err
    assert main(["predict", str(run), *images, "--min-probability", between]) == 0
    assert sum(" rejected (" in line for line in capsys.readouterr().out.splitlines()) == 1
    assert main(["predict", str(pair_run), images[0], "--min-probability", "0.1"]) == 0
    assert "not calibrated: the run had no validation split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "RUN", "a.png", "--min-probability", "1.5"], "--min-probability 1.5 must be a probability"),
        (["predict", "RUN", "broken.png"], "broken.png: not an image"),
        (["predict", "RUN", "nowhere.png"], "nowhere.png: No such file or directory"),
        (["predict", "RUN", "nowhere.png", "--show", "4"], "--show 4 must be from 1 to 3"),
        (["predict", "nowhere", "nowhere.png", "--show", "0"], "--show 0 must be at least 1"),
        (["predict", "RUN"], "needs images"),
        (["predict", "nowhere", "a.png"], "nowhere does not exist: give the output folder of lpt-peft train"),
        (["predict", ".", "a.png"], ". has no prompts.safetensors: give the output folder of lpt-peft train"),
        (["predict", "broken.png", "a.png"], "broken.png is not a run: give the output folder"),
        (["predict", "RUN", "folder"], "The folder folder has no image: check the path."),
        (["predict", "RUN", "folder/*.jpg"], "No file matches folder/*.jpg: check the path."),
        (["predict", "RUN", "a.png", "--json", "--format", "csv"], "contradicts --format csv: give one of them"),
        (["predict", "RUN", "a.png", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["predict", "RUN", "a.png", "--num-workers", "-1"], "--num-workers -1 must be at least 0"),
        (["predict", "RUN", "a.png", "--device", "quantum"], "device='quantum' is not available"),
        (["predict", "no/run/here", "a.png"], "no/run/here does not exist: give the output folder"),
    ],
)
def test_errors(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("not an image")
    Path("folder").mkdir()
    assert main([word.replace("RUN", str(run)) for word in words]) == 1
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


def test_unreadable_images_lose_no_answers(run, data, tmp_path, capsys):
    """70 images are more than a batch; three of them cannot be read."""
    good = [str(path) for path in sorted((data / "train" / "ant").glob("*.png"))]
    images = [*(good * 4)[:67]]
    (tmp_path / "half.png").write_bytes(Path(good[0]).read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    bad = [str(tmp_path / name) for name in ("half.png", "empty.png", "missing.png")]
    for place, path in zip((0, 30, 69), bad, strict=True):
        images.insert(place, path)
    assert main(["predict", str(run), *good]) == 0
    expected = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert main(["predict", str(run), *images]) == 3
    streams = capsys.readouterr()
    lines = [line.split() for line in streams.out.splitlines()]
    assert [line[0] for line in lines] == [path for path in images if path not in bad]
    assert all(line[1:] == expected[line[0]] for line in lines)
    first, *rest = streams.err.splitlines()
    assert first == "lpt-peft: 3 of 70 images cannot be read and were left out:"
    assert [line.split(":")[0].strip() for line in rest] == bad
    assert "the file is empty" in rest[1]
    assert rest[2] == f"  {bad[2]}: No such file or directory"
    assert main(["predict", str(run), *images, "--json"]) == 3
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == images
    assert {answer["image"] for answer in answers if "error" in answer} == set(bad)
    assert all(("classes" in answer) != ("error" in answer) for answer in answers)
    assert main(["predict", str(run), *bad, "--json"]) == 1
    assert [set(answer) for answer in json.loads(capsys.readouterr().out)] == [{"image", "error"}] * 3


def test_answers_are_written_batch_by_batch(run, data, capsys, monkeypatch):
    """What was printed before an interruption can be read, in every format."""
    image = str(data / "test" / "ant" / "0.png")
    original, calls = items._open, []

    def interrupt(path):
        calls.append(path)
        if len(calls) % 100 == 0:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(items, "_open", interrupt)
    words = ["predict", str(run), *[image] * 120]
    for output_format in ("table", "json", "jsonl", "csv"):
        calls.clear()
        assert main([*words, "--format", output_format]) == 130
        out = capsys.readouterr().out
        if output_format == "json":
            assert len(json.loads(out)) == 64
        else:
            assert len(out.splitlines()) == 64 + (output_format == "csv")
    calls.clear()
    assert main([*words, "--batch-size", "10"]) == 130
    assert len(capsys.readouterr().out.splitlines()) == 90


def test_two_classes(pair_run, capsys):
    images = [str(path) for path in sorted((pair_run.parent / "data").rglob("*.png"))]
    assert main(["predict", str(pair_run), *images, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert all({entry["class"] for entry in answer["classes"]} == {"été", "日本"} for answer in answers)
    assert main(["predict", str(pair_run), images[0], "--show", "3"]) == 1
    assert "--show 3 must be from 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_paths_from_standard_input(pair_run, tmp_path, separator):
    source = next((pair_run.parent / "data").rglob("*.png"))
    names = [b"a b.png", "日本.png".encode(), b"caf\xe9.png"]  # the last is not UTF-8
    names += [b"two\nlines.png"] if separator == b"\0" else []
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "lpt_peft", "predict", str(pair_run), "-", "--json"]
    done = subprocess.run(
        command, input=separator.join(names) + separator, capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.decode())
    assert [os.fsencode(answer["image"]) for answer in answers] == names


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_class_names_and_paths_on_other_terminals(pair_run, tmp_path, environment):
    source = next((pair_run.parent / "data").rglob("*.png"))
    image = tmp_path / "naïve 🐈\n.png"
    image.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "lpt_peft", "predict", pair_run, image]
    done = subprocess.run([*command, "--json"], capture_output=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout.decode("utf-8"))
    assert os.fsencode(answer["image"]) == os.fsencode(image)
    assert {entry["class"] for entry in answer["classes"]} == {"été", "日本"}
    text = subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)
    assert text.returncode == 0, text.stderr
    assert len(text.stdout.splitlines()) == 1


def test_a_prompt_file_alone_reads_images_as_its_run_did(data, tmp_path, monkeypatch):
    """EXIF orientation, background and crop of the training are in the prompt file."""
    words = ["--background", "0", "128", "255", "--no-exif", *BACKBONE, *SMALL, "--crop-pct", "0.9"]
    assert main(["train", str(data), "--output", str(tmp_path / "run"), *words]) == 0
    prompts = tmp_path / "run" / "prompts"
    recorded = json.loads((prompts / "config.json").read_text())["preprocess"]
    assert (recorded["exif"], recorded["background"], recorded["crop_pct"]) == (False, [0, 128, 255], 0.9)
    run = load_run(tmp_path / "run")
    monkeypatch.setattr("lpt_peft.adapter.LongTailPromptAdapter.from_pretrained", load_adapter)
    alone = load_run(prompts)
    for name in ("exif", "background", "crop_pct"):
        assert getattr(alone.images, name) == getattr(run.images, name)
    image = np.zeros((40, 48, 4), dtype=np.uint8)
    image[:20] = [200, 30, 90, 255]  # the rest is transparent
    Image.fromarray(image).save(tmp_path / "image.png")
    answers = [Classifier.from_pretrained(source)(tmp_path / "image.png")[0] for source in (tmp_path / "run", prompts)]
    assert answers[0] == answers[1]
    assert len(answers[0].labels) == 3


def answers_of(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def photos(data, tmp_path):
    """Folders of images, among them a file that is not an image, a damaged image and hidden files."""
    folder = tmp_path / "photos"
    shutil.copytree(data / "test", folder / "a")
    shutil.copytree(data / "val", folder / "b" / "c")
    (folder / "a" / "ant" / "notes.txt").write_text("none")
    (folder / "b" / ".hidden.png").write_bytes(b"")
    (folder / "b" / "broken.png").write_bytes(b"x")
    return folder


def test_folders_patterns_and_lists_of_images(run, photos, capsys):
    expected = sorted(str(path) for path in photos.rglob("[!.]*.png"))
    assert len(expected) == 24
    words = ["predict", str(run), "--format", "jsonl", "--show", "1"]
    for places in ([str(photos)], [str(photos / "a"), str(photos / "b")], [str(photos / "**" / "*.png")]):
        assert main([*words, *places]) == 3
        streams = capsys.readouterr()
        answers = {answer["image"]: answer for answer in answers_of(streams.out)}
        assert sorted(answers) == expected
        [broken] = [name for name, answer in answers.items() if "error" in answer]
        assert broken == str(photos / "b" / "broken.png")
        assert "1 of 24 images cannot be read and were left out" in streams.err
        assert "not an image" in streams.err


def test_every_format_states_the_same(run, photos, capsys):
    words = ["predict", str(run), str(photos), "--show", "2", "--min-probability", "0.4"]
    found = {}
    for output_format in ("json", "jsonl", "csv"):
        assert main([*words, "--format", output_format]) == 3
        found[output_format] = capsys.readouterr().out
    answers = json.loads(found["json"])
    assert answers_of(found["jsonl"]) == answers
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert list(rows[0]) == [
        *("image", "class", "label", "probability", "class_2", "label_2", "probability_2", "rejected", "error")
    ]
    for row, answer in zip(rows, answers, strict=True):
        assert row["image"] == answer["image"]
        assert row["error"] == answer.get("error", "")
        if "classes" in answer:
            assert row["rejected"] == str(answer["rejected"])
            for suffix, entry in zip(("", "_2"), answer["classes"], strict=True):
                assert row[f"class{suffix}"] == entry["class"]
                assert int(row[f"label{suffix}"]) == entry["label"]
                assert float(row[f"probability{suffix}"]) == entry["probability"]
    assert main([*words, "--json"]) == 3
    assert capsys.readouterr().out == found["json"]


def test_workers_and_batches_do_not_change_the_answers(run, photos, capsys):
    words = ["predict", str(run), str(photos), "--format", "jsonl"]
    assert main([*words, "--num-workers", "0"]) == 3
    expected = capsys.readouterr()
    assert main([*words, "--num-workers", "2", "--batch-size", "5"]) == 3
    found = capsys.readouterr()
    assert found.err == expected.err
    for answer, other in zip(answers_of(found.out), answers_of(expected.out), strict=True):
        assert answer["image"] == other["image"]
        assert answer.get("error") == other.get("error")
        for entry, same in zip(answer.get("classes", ()), other.get("classes", ()), strict=True):
            assert entry["label"] == same["label"]
            assert entry["probability"] == pytest.approx(same["probability"], abs=1e-6)
    assert not multiprocessing.active_children()


def test_answers_come_before_the_end_of_standard_input(run, data):
    """A list that is written while it is read, as by `find`; then Ctrl-C."""
    image = str(data / "test" / "ant" / "0.png")
    command = [sys.executable, "-m", "lpt_peft", "predict", str(run), "-", "--format", "jsonl"]
    options = ["--batch-size", "1", "--num-workers", "0"]
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(2):
            process.stdin.write(f"{image}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["image"] == image
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.wait(60) == 130
        assert process.stdout.read() == ""
        assert process.stderr.read() == "lpt-peft: interrupted after 2 images.\n"


def read_answers(text, output_format):
    """Paths of the images in a document; it must be complete."""
    if output_format == "table":
        assert text.endswith("\n")
        return [line.split()[0] for line in text.splitlines()]
    if output_format == "csv":
        assert text.endswith("\n")
        rows = list(csv.DictReader(io.StringIO(text)))
        assert all(0 < float(row["probability"]) <= 1 and None not in row for row in rows)
        return [row["image"] for row in rows]
    answers = json.loads(text) if output_format == "json" else answers_of(text)
    assert all(len(answer["classes"]) == 3 for answer in answers)
    return [answer["image"] for answer in answers]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("output_format", ["table", "json", "jsonl", "csv"])
def test_ctrl_c_loses_nothing_that_was_printed(run, data, output_format, workers):
    """Ctrl-C reaches all processes of the command; what was printed before is complete."""
    image = str(data / "test" / "ant" / "0.png")
    words = ["predict", str(run), "-", "--format", output_format, "--batch-size", "7", "--num-workers", workers]
    with subprocess.Popen(
        [sys.executable, "-m", "lpt_peft", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        feeder = threading.Thread(target=feed, args=(process.stdin, image))
        feeder.start()
        text = "".join(process.stdout.readline() for _ in range(40))
        os.killpg(process.pid, signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 130
        feeder.join()
    found = read_answers(text + rest, output_format)
    assert len(found) >= 38
    assert len(found) % 7 == 0
    assert set(found) == {image}
    assert err == f"lpt-peft: interrupted after {len(found)} images.\n"


def feed(stream, image):
    """Write the path of an image until the reader has gone."""
    with suppress(BrokenPipeError):
        while True:
            stream.write(f"{image}\n")
    with suppress(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("output_format", ["table", "json", "jsonl", "csv"])
def test_an_interruption_while_a_batch_is_written_waits_for_its_end(run, data, capsys, monkeypatch, output_format):
    image = str(data / "test" / "ant" / "0.png")

    class Interrupted:
        def __init__(self, *arguments):
            self._writer = make_writer(*arguments)
            self.close = self._writer.close

        def write(self, answers):
            os.kill(os.getpid(), signal.SIGINT)
            self._writer.write(answers)

    monkeypatch.setattr(prediction_output, "make_writer", Interrupted)
    words = ["predict", str(run), *[image] * 12, "--format", output_format, "--batch-size", "5"]
    assert main(words) == 130
    out, err = capsys.readouterr()
    assert read_answers(out, output_format) == [image] * 5
    assert err == "lpt-peft: interrupted after 5 images.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("output_format", ["table", "json", "jsonl", "csv"])
def test_a_reader_that_has_gone_ends_the_command_quietly(run, data, output_format):
    """As in `lpt-peft predict run - | head -n 1`."""
    image = str(data / "test" / "ant" / "0.png")
    words = ["predict", str(run), "-", "--format", output_format, "--batch-size", "7", "--num-workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "lpt_peft", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        feeder = threading.Thread(target=feed, args=(process.stdin, image))
        feeder.start()
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == BROKEN_PIPE
        feeder.join()


def test_names_with_unusual_characters(run, data, tmp_path):
    names = [
        "a b",
        'quo"te',
        "com,ma",
        "new\nline",
        "car\rriage",
        "t\tab",
        "back\\slash",
        "esc\x1b[31m",
        "日本",
        "[red]",
    ]
    paths = [os.fsencode(tmp_path / f"{name}.png") for name in names] + [os.fsencode(tmp_path) + b"/caf\xe9.png"]
    for path in paths:
        shutil.copy(data / "test" / "ant" / "0.png", path)
    command = [sys.executable, "-m", "lpt_peft", "predict", str(run), *paths, "--format"]
    found = {
        output_format: subprocess.run([*command, output_format], capture_output=True, check=True).stdout.decode()
        for output_format in ("table", "json", "jsonl", "csv")
    }
    assert [os.fsencode(path) for path in read_answers(found["jsonl"], "jsonl")] == paths
    assert [os.fsencode(path) for path in read_answers(found["json"], "json")] == paths
    *rest, last = [row["image"] for row in csv.DictReader(io.StringIO(found["csv"], newline=""))]
    assert [os.fsencode(path) for path in rest] == paths[:-1]
    assert last.endswith("/caf\\udce9.png")
    assert len(found["table"].splitlines()) == len(found["jsonl"].splitlines()) == len(paths)
    assert "\x1b" not in found["table"] + found["jsonl"] + found["json"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_before_an_error_are_answered(run, data, tmp_path, capsys, monkeypatch, workers):
    """With a list on standard input, the other places are not read in advance."""
    images = [str(data / "test" / "ant" / f"{number}.png") for number in range(2)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(images[1].encode())))
    words = ["predict", str(run), images[0], "-", str(tmp_path), "--json", "--num-workers", workers]
    assert main(words) == 1
    streams = capsys.readouterr()
    assert [answer["image"] for answer in json.loads(streams.out)] == images
    assert f"The folder {tmp_path} has no image" in streams.err


def test_an_empty_list_is_an_error(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    assert main(["predict", str(run), "-", "--json"]) == 1
    streams = capsys.readouterr()
    assert "Standard input names no image" in streams.err
    assert streams.out == ""


def test_long_lists_are_split_at_the_same_separators(monkeypatch):
    names = [f"{'x' * (number % 97)}{number}.png" for number in range(20_000)]
    for separator in ("\n", "\0", "\r\n"):
        text = separator.join(names).encode()
        assert len(text) > 3 * predict_module._BLOCK
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert list(predict_module._paths_of_stdin()) == names
