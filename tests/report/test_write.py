"""The page of a run: numbers, pictures, gallery and missing files."""

from __future__ import annotations

import base64
import csv
import json
import re
from html import unescape
from io import BytesIO, StringIO

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch.utils.data import TensorDataset

from lpt_peft.analysis.plots import plot_classes
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.errors import InputError, StateError
from lpt_peft.recipe.predictions import read_predictions, write_predictions
from lpt_peft.report import write_report
from lpt_peft.report.gallery import THUMBNAILS, gallery
from tests.report.sample import labelled_images, red_of, write_run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    analysis, images = write_run(folder, classes=8, images=200)
    found = write_report(folder, images=images, command=["lpt-peft", "train", "my photos", "--seed", "1"])
    return found, analysis, images


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, to be changed, whose report has a single picture: drawing takes most of the time."""
    monkeypatch.setattr("lpt_peft.report.write.figures", lambda analysis: {"classes": plot_classes(analysis)})
    write_run(tmp_path / "run", classes=5, images=60)
    return tmp_path / "run"


def text_of(path):
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|script).*?</\1>", "", path.read_text("utf-8"))))


def percent(value):
    return f"{100 * value:.1f}\xa0%"


def test_numbers_are_those_of_the_analysis(written):
    found, analysis, _ = written
    text = text_of(found.path)
    for shot in ("overall", "many", "medium", "few"):
        row = analysis["accuracy"][shot]
        assert f"{percent(row['estimate'])} ({100 * row['low']:.1f} to {100 * row['high']:.1f})" in text
    for state in ("plain", "shared", "group"):
        assert percent(analysis["features"][state]["knn_1"]["balanced_accuracy"]) in text
    none = analysis["pool"]["chosen_minus"]["none"]
    assert f"{100 * none['estimate']:+.1f}".replace("-", "−") in text
    assert (
        f"Mean gap over bins of probability (ECE): {percent(analysis['calibration']['before']['overall']['error'])}"
        in text
    )
    assert "lpt-peft train 'my photos' --seed 1" in text
    assert found.left_out == {}


def test_table_of_classes(written):
    found, analysis, _ = written
    page = found.path.read_text("utf-8")
    table = re.search(r'(?s)<table class="sortable" id="class-table".*?</table>', page)[0]
    rows = re.findall(r"(?s)<tr><th scope=\"row\">.*?</tr>", table)
    classes = analysis["classes"]
    assert len(rows) == 8
    order = sorted(range(8), key=lambda label: -classes["train_images"][label])
    for row, label in zip(rows, order, strict=True):
        cells = [unescape(cell) for cell in re.findall(r"<bdi>(.*?)</bdi>", row)]
        bounds = binomtest(classes["correct"][label], classes["images"][label]).proportion_ci(method="wilson")
        assert cells == [
            f"species {label}",
            f"{classes['train_images'][label]:,}",
            classes["shots"][label],
            percent(classes["correct"][label] / classes["images"][label]),
            f"{100 * bounds.low:.1f} to {100 * bounds.high:.1f}",
            str(classes["images"][label]),
            f"species {classes['confused_with'][label]} ({classes['confused_images'][label]})",
        ]


def test_csv_has_all_classes(written):
    found, analysis, _ = written
    link = re.search(
        r'<a download="classes.csv" href="data:text/csv;charset=utf-8;base64,(.*?)"', found.path.read_text()
    )
    rows = list(csv.DictReader(StringIO(base64.b64decode(unescape(link[1])).decode("utf-8-sig"))))
    classes = analysis["classes"]
    assert [row["class"] for row in rows] == classes["name"]
    assert [float(row["accuracy"]) for row in rows] == classes["accuracy"]
    assert [int(row["training_images"]) for row in rows] == classes["train_images"]


def test_csv_runs_no_formula(tmp_path):
    write_run(tmp_path / "run", names=["=1+1", "+x", "-x", "@x", "a", "b"], images=60)
    page = write_report(tmp_path / "run").path.read_text()
    content = base64.b64decode(unescape(re.search(r"text/csv;charset=utf-8;base64,(.*?)\"", page)[1])).decode(
        "utf-8-sig"
    )
    assert [row["class"] for row in csv.DictReader(StringIO(content))] == ["'=1+1", "'+x", "'-x", "'@x", "a", "b"]


def test_the_file_is_self_contained(written):
    page = written[0].path.read_text("utf-8")
    assert written[0].size == written[0].path.stat().st_size
    for reference in re.findall(r"""(?:src|href)=["'](.*?)["']""", page):
        assert reference.startswith(("data:", "#")), reference[:80]
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[\w+/=]+", "", page))
    assert "default-src 'none'" in unescape(page)
    pictures = re.findall(r'<img src="data:image/png;base64,(.*?)" alt="(.*?)">', page)
    assert len(pictures) == 10
    for source, alt in pictures:
        assert Image.open(BytesIO(base64.b64decode(unescape(source)))).width == 1200
        assert len(alt) > 20


def test_gallery_shows_the_surest_mistakes(written):
    found, analysis, images = written
    predictions = read_predictions(found.path.parent / "predictions.safetensors")["test"]
    rows = [
        (float(p), row)
        for row, (t, g, p) in enumerate(
            zip(predictions.target, predictions.prediction, predictions.probability, strict=True)
        )
        if t != g
    ]
    rows.sort(key=lambda pair: -pair[0])
    shown = gallery(predictions, images, analysis["classes"])
    assert shown.mistakes == len(rows) == 200 - sum(analysis["classes"]["correct"])
    assert len(shown.thumbnails) == THUMBNAILS == 48
    for thumbnail, (probability, row) in zip(shown.thumbnails, rows, strict=False):
        assert thumbnail.probability == percent(probability)
        assert abs(red_of(thumbnail.picture) - row) <= 3
        assert thumbnail.target == f"species {int(predictions.target[row])}"
        assert thumbnail.prediction == f"species {int(predictions.prediction[row])}"
    assert found.path.read_text().count("data:image/jpeg") == 48


def test_unreadable_images_are_skipped_and_counted(run):
    predictions = read_predictions(run / "predictions.safetensors")["test"]
    images = labelled_images(predictions.target.tolist(), [f"species {label}" for label in range(5)])
    read = images.images.read
    wrong = (~predictions.correct).nonzero().flatten()
    surest = int(wrong[predictions.probability[wrong].argmax()])

    def broken(position):
        if position == surest:
            raise OSError("truncated")
        return read(position)

    images.images.read = broken
    found = write_report(run, images=images)
    assert found.unreadable == 1
    assert "Skipped, because they cannot be read: 1 image." in text_of(found.path)


def test_images_of_another_split_are_not_shown(run):
    predictions = read_predictions(run / "predictions.safetensors")["test"]
    names = [f"species {label}" for label in range(5)]
    for target in (predictions.target.flip(0).tolist(), predictions.target[:-1].tolist()):
        found = write_report(run, images=labelled_images(target, names))
        assert "other images" in found.left_out["mistakes"]
        assert "data:image/jpeg" not in found.path.read_text()


def test_images_that_were_left_out_of_the_predictions_keep_their_positions(run):
    path = run / "predictions.safetensors"
    predictions = read_predictions(path)["test"]
    kept = [position for position in range(60) if position != 3]
    images = labelled_images(predictions.target.tolist(), [f"species {label}" for label in range(5)])
    fields = {name: getattr(predictions, name)[kept] for name in ("target", "prediction", "probability", "groups")}
    position = predictions.target.new_tensor(kept)
    write_predictions(path, {"test": predictions._replace(**fields, position=position)})
    classes = json.loads((run / "analysis/analysis.json").read_text())["classes"]
    found = gallery(read_predictions(path)["test"], images, classes)
    wrong = [row for row in kept if predictions.target[row] != predictions.prediction[row]]
    wrong.sort(key=lambda row: -predictions.probability[row])
    for thumbnail, row in zip(found.thumbnails, wrong, strict=True):
        assert abs(red_of(thumbnail.picture) - row) <= 3


@pytest.mark.parametrize(
    ("name", "part", "cure"),
    [
        ("predictions.safetensors", "mistakes", "lpt-peft train command again"),
        ("history.json", "curves", "lpt-peft train command again"),
        ("settings.json", "settings", "Only lpt-peft train writes it"),
    ],
)
def test_missing_files_are_named_with_their_cure(run, name, part, cure):
    (run / name).unlink()
    found = write_report(run)
    assert str(run / name) in found.left_out[part]
    assert cure in found.left_out[part]
    assert found.left_out[part] in text_of(found.path)


def test_missing_results_and_analysis(run, tmp_path):
    (run / "analysis/analysis.json").unlink()
    with pytest.raises(StateError, match=r"was not analysed. Run lpt-peft analyse .*--no-analysis"):
        write_report(run)
    (run / "results.json").unlink()
    with pytest.raises(StateError, match=r"interrupted. The same lpt-peft train command resumes it"):
        write_report(run)
    (run / "settings.json").unlink()
    with pytest.raises(InputError, match="has no results.json: give the output folder"):
        write_report(run)
    with pytest.raises(InputError, match="does not exist: give the output folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "both" / "lpt" / "seed0").mkdir(parents=True)
    for folder in (tmp_path / "both", tmp_path / "both" / "lpt" / "seed0"):
        (folder / "results.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match=r"comparison. Name the runs in it, such as .*seed0"):
        write_report(tmp_path / "both")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "[]", "must hold a JSON object"),
        ("history.json", "{}", "must be a list of records"),
        ("history.json", "[{}]", "epoch, loss, phase"),
        ("history.json", "[NaN]", "cannot be read"),
        ("settings.json", "x", "not strict JSON"),
        ("analysis/analysis.json", '{"format_version": 2}', "has format 2, not 1. Write it again: lpt-peft analyse"),
        ("analysis/analysis.json", '{"format_version": 1}', "lacks model"),
    ],
)
def test_damaged_files_are_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(StateError, match=message) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value)


def test_lists_of_classes_must_fit(run):
    path = run / "analysis/analysis.json"
    analysis = json.loads(path.read_text())
    analysis["classes"]["name"].pop()
    path.write_text(json.dumps(analysis))
    with pytest.raises(StateError, match="lists of classes of different lengths"):
        write_report(run)


def test_an_analysis_of_other_predictions_is_noted(run):
    path = run / "analysis/analysis.json"
    analysis = json.loads(path.read_text())
    analysis["classes"]["correct"] = [0] * 5
    path.write_text(json.dumps(analysis))
    assert "the run was trained again" in write_report(run).left_out["analysis"].replace("or the run", "the run")


def test_pages_of_equal_files_are_equal(run, tmp_path):
    first, second = (write_report(run, output=tmp_path / name).path.read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert not (run / "report.html").exists()


@pytest.mark.slow
def test_thousands_of_classes(tmp_path):
    """The measured scale, 8,142 classes and 100,000 images, takes minutes to make: see the note of the report."""
    folder = tmp_path / "run"
    _, images = write_run(folder, classes=1200, images=6000)
    found = write_report(folder, images=images)
    assert found.size < 5e6
    page = found.path.read_text("utf-8")
    assert page.count('<th scope="row"') < 400
    assert "the first 300 of 1,200 rows" in page
    rows = re.search(r'(?s)<script type="application/json" id="class-table-rows">(.*?)</script>', page)[1]
    assert len(json.loads(rows)) == 1200


def test_images_of_tensors_have_thumbnails(run):
    predictions = read_predictions(run / "predictions.safetensors")["test"]._replace(images=None)
    position = torch.arange(60).view(60, 1, 1, 1) / 60
    pixels = torch.cat([torch.zeros(60, 3, 4, 8), position.expand(60, 3, 4, 8), torch.ones(60, 3, 4, 8)], dim=2)
    images = from_dataset(TensorDataset(pixels, predictions.target))
    found = gallery(predictions, images, json.loads((run / "analysis/analysis.json").read_text())["classes"])
    wrong = [row for row in range(60) if predictions.target[row] != predictions.prediction[row]]
    surest = max(wrong, key=lambda row: predictions.probability[row])
    assert abs(red_of(found.thumbnails[0].picture) - 255 * surest / 60) <= 6
