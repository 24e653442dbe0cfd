"""Pictures: size, colours, limits, and what they draw of missing values."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from lpt_peft.analysis.plots import (
    figures,
    plot_calibration,
    plot_class_rows,
    plot_classes,
    plot_matching,
    plot_shift,
    png,
)
from lpt_peft.analysis.plots.style import PALETTE, SHOTS, STATES
from tests.analysis.sample import sample_analysis

SECTIONS = [
    "classes",
    "features",
    "projection",
    "pretraining",
    "matching",
    "pool",
    "calibration",
    "confused_pairs",
    "shift",
]


@pytest.fixture(scope="module")
def analysis():
    return json.loads(json.dumps(sample_analysis(), allow_nan=False))  # as read from the file


def texts(figure):
    return [text.get_text() for text in figure.findobj(match=lambda item: hasattr(item, "get_text"))]


def test_every_section_has_a_picture_on_white(analysis):
    drawn = figures(analysis)
    assert list(drawn) == SECTIONS
    for name, figure in drawn.items():
        image = Image.open(BytesIO(png(figure)))
        assert image.width >= 1200, name  # 800 px of a page with twice 0.75 pixels each
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255), name
        assert len(png(figure)) < 400_000, name


def test_text_is_dark_and_large_enough(analysis):
    for name, figure in figures(analysis).items():
        for text in figure.findobj(match=lambda item: hasattr(item, "get_fontsize")):
            assert max(to_rgb(text.get_color())) < 0.3, (name, text.get_text())
            assert text.get_fontsize() >= 8 or not text.get_text(), (name, text.get_text())


def test_missing_sections_have_no_picture(analysis):
    kept = {name: analysis[name] for name in ("classes", "calibration")} | {"confused_pairs": [], "shift": []}
    assert list(figures(kept)) == ["classes", "calibration"]


@pytest.mark.parametrize("kind", ["protan", "deutan", "normal"])
def test_colours_differ_for_readers_who_see_two_of_three_primaries(kind):
    # Viénot, Brettel & Mollon 1999: linear RGB as seen without the first or second kind of cone.
    mix = {
        "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
        "normal": np.eye(3),
    }[kind]
    for colours in (PALETTE, SHOTS.values(), [colour for _, colour in STATES.values()]):
        linear = np.array([to_rgb(colour) for colour in colours]) ** 2.2
        seen = np.clip(linear @ np.array(mix).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        assert distances[np.triu_indices(len(seen), 1)].min() > 0.14  # of 1.73; points also differ in their markers


def test_heat_map_of_thousands_of_classes_has_at_most_40_rows():
    analysis = sample_analysis(classes=800, images=1600)
    figure = plot_matching(analysis)
    rows = figure.axes[1].get_yticklabels()
    assert len(rows) == 40
    assert rows[0].get_text().startswith(r"class \$0\$")  # most frequent first, no formula
    assert rows[-1].get_text().startswith(r"class \$799\$")
    assert any("1 unused" in text for text in texts(figure))
    assert len(plot_classes(analysis).axes[0].lines) == 1  # the mean of neighbouring classes


def test_a_shot_group_without_images_has_no_curve(analysis):
    without = json.loads(json.dumps(analysis))
    empty = {"error": None, "images": [0] * 15, "accuracy": [None] * 15, "confidence": [None] * 15}
    without["calibration"]["before"]["few"] = empty
    without["calibration"]["after"] = None
    names = texts(plot_calibration(without))
    assert not any(name.startswith("few") for name in names)
    assert any(name.startswith("many:") for name in names)
    assert any(name.startswith("few") for name in texts(plot_calibration(analysis)))


def test_accuracies_are_written_in_percent(analysis):
    names = texts(plot_shift(analysis))
    assert "-50.0" in names
    assert "sketch (30 images)" in names
    assert not any("empty" in name for name in names)
    best = analysis["pool"]["rows"]["oracle"]["balanced_accuracy"]
    assert f"{100 * best:.1f}" in texts(figures(analysis)["pool"])


def class_rows(classes):
    """Rows of `results.json`; the last class has no images."""
    rows = []
    for label in range(classes):
        share = label / classes
        interval = {"accuracy": share, "low": share / 2, "high": (1 + share) / 2}
        counts = {"train_images": 1 + 3 * label, "images": 10, "correct": 5}
        rows.append({"name": f"c{label}", "shot": "few" if label < 7 else "medium", **counts, **interval})
    rows[-1] |= {"images": 0, "correct": 0, "accuracy": None, "low": None, "high": None}
    return rows


def test_classes_of_a_run_have_their_accuracy_above_their_images_and_intervals():
    rows = class_rows(10)
    upper, lower = plot_class_rows(rows).axes
    order = rows[::-1]  # the last class is the most frequent
    points = {
        tuple(point)
        for item in upper.collections[:2]
        for point in np.round(np.ma.filled(item.get_offsets(), np.nan), 6)
    }
    expected = {(place, round(100 * row["accuracy"], 6)) for place, row in enumerate(order) if row["images"]}
    assert {point for point in points if not np.isnan(point[1])} == expected
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in lower.patches}
    assert heights == {place: row["train_images"] for place, row in enumerate(order)}
    lines = {segment[0][0]: segment[:, 1] for segment in upper.collections[2].get_segments() if len(segment)}
    for place, row in enumerate(order[1:], start=1):
        assert np.allclose(lines[place], [100 * row["low"], 100 * row["high"]])
    assert lower.get_ylim()[0] < 1  # a bar of one image is visible
    assert [label.get_text() for label in lower.get_xticklabels()] == [row["name"] for row in order]


def test_the_picture_of_a_run_repeats_byte_by_byte():
    for classes in (10, 80):
        first, second = (png(plot_class_rows(class_rows(classes))) for _ in range(2))
        assert first == second
        assert Image.open(BytesIO(first)).info.keys() <= {"dpi"}  # no date, no version
    assert len(plot_class_rows(class_rows(80)).axes[0].collections) == 2  # no intervals for many classes


def test_a_run_without_test_images_has_an_empty_picture():
    rows = [row | {"accuracy": None, "low": None, "high": None} for row in class_rows(3)]
    assert "few: no test images" in texts(plot_class_rows(rows))
