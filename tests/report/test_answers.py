"""Answers of the first screen."""

from __future__ import annotations

import copy

import pytest

from lpt_peft.report.answers import answers
from tests.report.sample import full_analysis

ACCURATE, FAILING, TAIL, PROMPTS, GROUPS, PROBABILITIES = range(6)


@pytest.fixture(scope="module")
def sample():
    return full_analysis(classes=8, images=200)


@pytest.fixture
def analysis(sample):
    return copy.deepcopy(sample)


def interval(low, high):
    return {"estimate": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("many", "few", "verdict"),
    [
        ((0.8, 0.9), (0.2, 0.4), "Yes: few-shot classes are 55.0 points below many-shot classes"),
        ((0.2, 0.4), (0.8, 0.9), "No: few-shot classes are 55.0 points above many-shot classes"),
        ((0.5, 0.7), (0.6, 0.8), "Not clearly: the intervals overlap"),
    ],
)
def test_the_tail(analysis, many, few, verdict):
    analysis["accuracy"] |= {"many": interval(*many), "few": interval(*few)}
    found = answers(analysis)[TAIL]
    assert found.verdict.replace("\xa0", " ") == verdict
    assert f"({100 * few[0]:.1f} to {100 * few[1]:.1f})" in found.text


def test_the_tail_of_classes_of_a_single_group(analysis):
    analysis["accuracy"] |= {"many": None, "medium": None}
    assert answers(analysis)[TAIL].verdict == "Cannot be compared"


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [((0.01, 0.03), "Yes: +2.0 points"), ((-0.03, -0.01), "No: −2.0 points"), ((-0.01, 0.03), "No clear gain")],
)
def test_the_groups(analysis, bounds, verdict):
    analysis["pool"]["chosen_minus"]["none"] = interval(*bounds)
    found = answers(analysis)[GROUPS]
    assert found.verdict.replace("\xa0", " ").startswith(verdict)
    assert f"({100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})".replace("-", "−") in found.text


def test_methods_without_groups_or_prompts(analysis):
    del analysis["pool"]
    analysis["model"] |= {"groups": None, "phase": "shared"}
    assert answers(analysis)[GROUPS].verdict == "Not trained"
    analysis["model"] |= {"method": "linear_probe", "phase": None}
    analysis["features"] = {"plain": analysis["features"]["plain"]}
    found = answers(analysis)
    assert found[GROUPS].verdict == "Not part of this method"
    assert found[PROMPTS].verdict == "No prompts"
    assert "the plain ViT" in found[PROMPTS].text


def test_left_out_sections(analysis):
    del analysis["pool"], analysis["features"]
    analysis["left_out"] = {"pool": "no time.", "features": "no passes."}
    found = answers(analysis)
    assert (found[GROUPS].verdict, found[PROMPTS].verdict) == ("Not measured", "Not measured")
    assert "no time." in found[GROUPS].text
    assert "no passes." in found[PROMPTS].text


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.5, "Yes: +50.0 points"), (-0.3, "No: −30.0 points"), (0.01, "Not clearly")]
)
def test_the_prompts(analysis, gain, verdict):
    features = analysis["features"]
    features["plain"]["knn_1"]["balanced_accuracy"] = 0.4
    features["group"]["knn_1"]["balanced_accuracy"] = 0.4 + gain
    assert answers(analysis)[PROMPTS].verdict.replace("\xa0", " ").startswith(verdict)


def test_the_margin_shrinks_with_the_number_of_images(analysis):
    def margin():
        words = answers(analysis)[PROMPTS].text.replace("\xa0", " ").split("up to about ")[1]
        return float(words.split(" ")[0])

    wide = margin()
    analysis["classes"]["images"] = [100 * count for count in analysis["classes"]["images"]]
    assert margin() == pytest.approx(wide / 10, abs=0.06)


def test_failing_classes(analysis):
    classes = analysis["classes"]
    weakest = min(range(8), key=lambda label: (classes["accuracy"][label], classes["train_images"][label]))
    found = answers(analysis)[FAILING]
    assert found.verdict == f"Weakest: {classes['name'][weakest]}"
    pair = analysis["confused_pairs"][0]
    assert f"{classes['name'][pair['target']]}, classified as {classes['name'][pair['prediction']]} in" in found.text
    analysis["weak"]["never_right"] = [1, 2]
    assert answers(analysis)[FAILING].verdict == "2 of 8 classes are never right"
    classes["accuracy"] = [1.0] * 8
    assert answers(analysis)[FAILING].verdict == "None"


def bins(images, confidence, accuracy, error):
    rows = {"images": images, "confidence": confidence, "accuracy": accuracy, "error": error}
    return {
        name: [*values, *[0 if name == "images" else None] * 13] if name != "error" else values
        for name, values in rows.items()
    }


@pytest.mark.parametrize(
    ("overall", "few", "verdict"),
    [
        (bins([50, 50], [0.4, 0.9], [0.4, 0.9], 0.0), 0.0, "Yes: the gap is at most 0.0 %"),
        (bins([50, 50], [0.4, 0.9], [0.4, 0.9], 0.0), 0.2, "Not for few-shot classes: their gap is 20.0 %"),
        (bins([50, 50], [0.8, 1.0], [0.4, 0.8], 0.3), 0.2, "No: on average 30.0 points too high"),
        (bins([50, 50], [0.2, 0.6], [0.4, 0.8], 0.2), 0.2, "No: on average 20.0 points too low"),
        (bins([50, 50], [0.2, 0.8], [0.4, 0.6], 0.2), 0.2, "No: the bins are off"),
    ],
)
def test_probabilities(analysis, overall, few, verdict):
    analysis["calibration"]["before"] |= {"overall": overall, "few": {**overall, "error": few}}
    assert answers(analysis)[PROBABILITIES].verdict.replace("\xa0", " ") == verdict


def test_nothing_was_evaluated(analysis):
    classes = analysis["classes"]
    classes |= {"images": [0] * 8, "correct": [0] * 8, "accuracy": [None] * 8}
    analysis["accuracy"] |= dict.fromkeys(("overall", "many", "medium", "few"))
    analysis["weak"] |= {"never_right": [], "worst": [], "worst_accuracy": None}
    analysis["calibration"]["before"]["overall"] = bins([0, 0], [None, None], [None, None], None)
    analysis["confused_pairs"] = []
    assert answers(analysis)[ACCURATE].verdict == "Not measured"
    assert answers(analysis)[PROBABILITIES].verdict == "Not measured"
