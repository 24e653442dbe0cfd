"""Rows of classes and calibration in results.json, and the temperature that a run fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.analysis import fit_temperature
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.recipe import Splits, fit, predict
from lpt_peft.recipe.class_report import class_report
from lpt_peft.recipe.predictions import PredictionRecorder, Predictions
from tests.recipe.tiny import PHASE, SHORT, striped_data, tiny_adapter, tiny_vit

SHARED_ONLY = replace(SHORT, group=replace(PHASE, epochs=0))


def test_the_rows_follow_from_the_predictions():
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    prediction = torch.tensor([0, 0, 0, 1, 0, 0, 2])
    probability = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.5])
    found = class_report(
        Predictions(target, prediction, probability), ["a", "b", "c", "d"], [500, 50, 5, 5], SHOT_RULES["lpt"]
    )
    rows = found["classes"]
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["shot"] for row in rows] == ["many", "medium", "few", "few"]
    assert [(row["correct"], row["images"], row["accuracy"]) for row in rows] == [
        (3, 4, 0.75),
        (0, 2, 0.0),
        (1, 1, 1.0),
        (0, 0, None),
    ]
    assert (rows[3]["low"], rows[3]["high"]) == (None, None)
    assert rows[0]["low"] < 0.75 < rows[0]["high"]
    assert found["never_right"] == 1, "a class without images does not count"
    errors = found["calibration_error"]
    assert errors["many"] == pytest.approx(abs(0.75 - 0.9), abs=1e-6)
    assert errors["medium"] == pytest.approx(0.6, abs=1e-6)
    assert errors["few"] == pytest.approx(0.5, abs=1e-6)
    assert errors["overall"] == pytest.approx((4 * 0.15 + 2 * 0.6 + 0.5) / 7, abs=1e-6)
    low, high = found["intervals"]["overall"]
    assert low <= (0.75 + 0 + 1) / 3 <= high
    json.dumps(found, allow_nan=False)


def run_splits(validation):
    dataset, labels = striped_data()
    return Splits(from_dataset(dataset, labels, ["ant", "bee", "cat"]), validation, striped_data(2)[0])


def test_a_run_stores_the_temperature_of_its_validation_images(tmp_path):
    adapter = tiny_adapter()
    validation = striped_data(3)[0]
    fit(adapter, run_splits(validation), SHARED_ONLY, tmp_path, progress=False)
    output, target = predict(adapter, validation)
    expected = fit_temperature(output.logits, target).value
    assert adapter.metadata.temperature == pytest.approx(expected, rel=1e-6)
    loaded = LongTailPromptAdapter.from_pretrained(tmp_path / "prompts", tiny_vit())
    assert loaded.metadata.temperature == adapter.metadata.temperature
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["test"]["classes"]] == ["ant", "bee", "cat"]
    assert results["test"]["calibration_error"]["overall"] == results["test"]["expected_calibration_error"]


def test_without_validation_images_an_earlier_temperature_is_dropped(tmp_path):
    adapter = tiny_adapter()
    adapter.metadata = replace(adapter.metadata, temperature=2.0)
    fit(adapter, run_splits(None), SHARED_ONLY, tmp_path, progress=False)
    assert adapter.metadata.temperature is None


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_nth_row_of_the_logits_is_kept_whatever_the_batches(every):
    logits, target = torch.randn(23, 4), torch.randint(4, (23,))
    recorder = PredictionRecorder(logits_every=every)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 20), slice(20, 23)):
        recorder.update((logits[rows],), target[rows])
    recorder.gather(list(range(23)), 23)
    kept, classes = recorder.logits
    assert torch.equal(kept, logits[::every])
    assert torch.equal(classes, target[::every])
