"""Figures of a comparison against the metrics of its runs; the table, Markdown, JSON and the figure."""

from __future__ import annotations

import json
import statistics
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpt_peft.analysis import bootstrap_accuracy, bootstrap_difference
from lpt_peft.errors import InputError, MissingExtraError
from lpt_peft.metrics import shot_metrics
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.compare.figure import draw
from lpt_peft.recipe.compare.results import Row, Run, compare
from lpt_peft.recipe.compare.table import caption, markdown, table
from lpt_peft.recipe.predictions import Predictions

COUNTS = [500, 50, 5]
TARGET = torch.arange(60) % 3


def predictions(seed, rate=0.7, target=TARGET, **changes):
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(len(target), generator=generator) < rate
    return Predictions(target, torch.where(right, target, (target + 1) % 3), torch.ones(len(target)), **changes)


def row(name, rate, seeds=(0, 1, 2), **options):
    runs = [Run(seed=seed, predictions=predictions(seed + 100 * len(name), rate), seconds=2.0 + seed) for seed in seeds]
    return Row(name=name, runs=runs, **options)


def comparison(**options):
    rows = [row("probe", 0.5), row("lpt", 0.8, trained_parameters=84_480, file_bytes=345_678)]
    return compare(rows, COUNTS, seeds=[0, 1, 2], baseline="probe", **options)


def values(runs, shot):
    found = []
    for run in runs:
        correct = torch.bincount(run.predictions.target[run.predictions.correct], minlength=3)
        total = torch.bincount(run.predictions.target, minlength=3)
        found.append(getattr(shot_metrics(correct, total, COUNTS), shot))
    return found


@given(
    st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 2)] * 4), min_size=1, max_size=12),
    st.sampled_from([(0,), (0, 1)]),
)
def test_figures_are_means_of_the_metrics(rows, seeds):
    target, *columns = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = [Predictions(target, column, torch.ones(len(target))) for column in columns]
    runs = {
        name: [Run(seed=seed, predictions=found[2 * number + seed]) for seed in seeds]
        for number, name in enumerate(("base", "other"))
    }
    result = compare([Row(name=name, runs=runs[name]) for name in runs], COUNTS, seeds=seeds, baseline="base")
    for shot in SHOTS:
        base, other = (row.figures[shot] for row in result.rows)
        expected = [values(runs[name], shot) for name in runs]
        if expected[0][0] is None:
            assert base is other is None
            continue
        assert [base.mean, other.mean] == pytest.approx([statistics.fmean(column) for column in expected])
        assert other.difference.estimate == pytest.approx(other.mean - base.mean)
        assert base.difference is None
        assert base.interval[0] - 1e-12 <= base.mean <= base.interval[1] + 1e-12
        assert other.difference.low - 1e-12 <= other.difference.estimate <= other.difference.high + 1e-12
        if len(seeds) == 1:
            assert base.spread is None
        else:
            assert base.spread == pytest.approx(statistics.stdev(expected[0]))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_intervals_are_those_of_the_bootstrap_over_seeds():
    result = comparison()
    correct = {row.name: torch.stack([run.predictions.correct for run in row.runs]) for row in result.rows}
    alone = bootstrap_accuracy(correct["lpt"], TARGET, COUNTS)["overall"]
    paired = bootstrap_difference(correct["lpt"], correct["probe"], TARGET, COUNTS)["overall"]
    figure = result.rows[1].figures["overall"]
    assert figure.interval == alone[1:]
    assert figure.difference == paired


def test_seeds_with_other_images_are_resampled_independently():
    """With validation images held out by the seed; labels may be equal."""
    runs = [Run(seed=s, predictions=predictions(0, images=images)) for s, images in enumerate(("a", "b"))]
    same = [Run(seed=s, predictions=predictions(0, images="a")) for s in range(2)]
    own, shared = (compare([Row(name="r", runs=r)], COUNTS).rows[0].figures["overall"].interval for r in (runs, same))
    assert (own[1] - own[0]) / (shared[1] - shared[0]) == pytest.approx(2**-0.5, abs=0.1)


def test_only_common_seeds_are_paired():
    rows = [row("probe", 0.5, seeds=(0, 2)), row("lpt", 0.8, seeds=(1, 2)), row("none", 0.8, seeds=(1,))]
    result = compare(rows, COUNTS, seeds=[0, 1, 2], baseline="probe")
    common = [values([runs[-1]], "overall")[0] for runs in (rows[0].runs, rows[1].runs)]
    assert result.rows[1].figures["overall"].difference.estimate == pytest.approx(common[1] - common[0])
    assert result.rows[2].figures["overall"].difference is None


@pytest.mark.parametrize("change", [{"images": "b"}, {"position": torch.arange(60)}, {"target": TARGET.flip(0)}])
def test_pairs_of_different_images_are_refused(change):
    rows = [
        Row(name="probe", runs=[Run(seed=0, predictions=predictions(0, images="a"))]),
        Row(name="lpt", runs=[Run(seed=0, predictions=predictions(1, **{"images": "a"} | change))]),
    ]
    with pytest.raises(InputError, match="lpt and probe, seed 0, were evaluated on different images"):
        compare(rows, COUNTS, baseline="probe")


def test_rows_without_a_run_are_left_out():
    failed = [{"row": "lpt", "seed": 0, "error": "x"}]
    result = compare([row("probe", 0.5), Row(name="lpt", runs=[])], COUNTS, baseline="lpt", failed=failed)
    assert [row.name for row in result.rows] == ["probe"]
    assert result.baseline is None
    assert result.to_dict()["failed"] == failed
    nothing = compare([Row(name="lpt", runs=[])], COUNTS)
    assert nothing.rows == []
    assert nothing.rule.startswith("many: n > 100")


def test_table_and_markdown():
    result = comparison()
    header, rows = table(result)
    assert header[:6] == ("", "overall", "95 % interval", "many", "medium", "few")
    assert header[6:8] == ("minus probe", "95 % interval")
    assert rows[0][6:8] == ("-", "-")
    figure = result.rows[1].figures["overall"]
    assert rows[1][1] == f"{100 * figure.mean:.1f} ± {100 * figure.spread:.1f}"
    assert rows[1][6] == f"{100 * figure.difference.estimate:+.1f}"
    assert rows[1][8:] == ("3", "84,480", "338 KiB", "3", "-")
    lines = markdown(result).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[0].count("|") == len(header) + 1
    assert "probe" in lines[2]
    assert "60 images" in caption(result)
    assert "3 seeds" in caption(result)
    header, rows = table(compare([row("lpt", 0.8)], COUNTS, seeds=[0, 1, 2]))
    assert len(header) == len(rows[0]) == 11


def test_time_of_a_killed_process_is_unknown():
    runs = [Run(seed=0, predictions=predictions(0), seconds=None), Run(seed=1, predictions=predictions(1), seconds=3.0)]
    result = compare([Row(name="lpt", runs=runs)], COUNTS, seeds=[0, 1])
    assert result.rows[0].seconds is None
    assert table(result)[1][0][-2] == "-"


def test_figure_is_drawn(tmp_path):
    draw(comparison(), tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as image:
        assert image.width == 1200
        assert len(image.convert("RGB").getcolors(2**20)) > 50


def test_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "lpt_peft\[demo\]"'):
        draw(comparison(), tmp_path / "compare.png")
