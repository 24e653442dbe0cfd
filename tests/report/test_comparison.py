"""The page of several runs."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
import torch

from lpt_peft.analysis import bootstrap_difference
from lpt_peft.errors import InputError
from lpt_peft.recipe.predictions import read_predictions
from lpt_peft.report import write_comparison
from lpt_peft.report.comparison import run_names
from lpt_peft.report.files import read_run
from tests.report.sample import write_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs on the same images, in folders of the same name."""
    folder = tmp_path_factory.mktemp("pair")
    folders = [folder / row / "seed0" for row in ("lpt", "probe")]
    for seed, run in enumerate(folders):
        write_run(run, classes=5, images=100, seed=seed)
    return folders


def text_of(path):
    return unescape(re.sub(r"<[^>]*>", " ", path.read_text("utf-8")))


def test_paired_differences(pair):
    found = write_comparison(pair)
    assert found.path == pair[0] / "comparison.html"
    first, second = (read_predictions(run / "predictions.safetensors")["test"] for run in pair)
    counts = json.loads((pair[0] / "analysis/analysis.json").read_text())["classes"]["train_images"]
    expected = bootstrap_difference(second.correct, first.correct, first.target, counts)["overall"]
    text = text_of(found.path)
    estimate, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in expected)
    assert f"{estimate}\xa0points ({low} to {high})" in text
    difference = [
        float(second.correct[first.target == c].double().mean() - first.correct[first.target == c].double().mean())
        for c in range(5)
    ]
    assert expected.estimate == pytest.approx(sum(difference) / 5)
    for name in ("lpt/seed0", "probe/seed0"):
        assert name in text
    assert "training.seed" in text  # the setting that differs
    assert found.path.read_text().count("data:image/png") == 2


def test_runs_on_other_images_have_no_difference(pair, tmp_path):
    write_run(tmp_path / "other", classes=5, images=80)
    found = write_comparison([pair[0], tmp_path / "other"], output=tmp_path / "page.html")
    assert "not those of the first run" in found.left_out["other"]
    assert "is left out: its test images are not those of the first run" in re.sub(r"\s+", " ", text_of(found.path))


def test_runs_with_other_classes(pair, tmp_path):
    write_run(tmp_path / "other", classes=7, images=100)
    found = write_comparison([pair[0], tmp_path / "other"], output=tmp_path / "page.html")
    assert "there is no table of classes" in text_of(found.path)


def test_a_run_without_predictions(pair, tmp_path):
    write_run(tmp_path / "other", classes=5, images=100)
    (tmp_path / "other" / "predictions.safetensors").unlink()
    found = write_comparison([pair[0], tmp_path / "other"], output=tmp_path / "page.html")
    assert "a run stored no predictions" in found.left_out["other"]


def test_names_and_numbers_of_runs(pair, tmp_path):
    with pytest.raises(InputError, match="at least two runs"):
        write_comparison(pair[:1])
    with pytest.raises(InputError, match="is given twice"):
        write_comparison([pair[0], pair[0]])
    assert run_names([read_run(run) for run in pair]) == ["lpt/seed0", "probe/seed0"]


def test_the_table_of_classes_has_a_column_for_each_run(pair, tmp_path):
    page = write_comparison(pair, output=tmp_path / "page.html").path.read_text()
    table = re.search(r'(?s)id="class-table".*?</table>', page)[0]
    analyses = [json.loads((run / "analysis/analysis.json").read_text()) for run in pair]
    assert torch.tensor([a["classes"]["train_images"] for a in analyses]).diff(dim=0).eq(0).all()
    row = re.search(r"(?s)<tr><th scope=\"row\"><bdi>species 0</bdi>.*?</tr>", table)[0]
    cells = [unescape(cell) for cell in re.findall("<bdi>(.*?)</bdi>", row)]
    values = [a["classes"]["accuracy"][0] for a in analyses]
    assert cells[3:5] == [f"{100 * value:.1f}\xa0%" for value in values]
    assert cells[5] == f"{100 * (max(values) - min(values)):.1f}\xa0points"
