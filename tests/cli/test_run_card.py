"""The results of a finished run as the model card shows them."""

from __future__ import annotations

import json
import warnings
from io import BytesIO

import pytest
from PIL import Image

from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.cli.common.run_card import run_card
from lpt_peft.hub import CardOptions, model_card
from lpt_peft.recipe import TrainSettings
from tests.cli.runs import NAMES


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_a_finished_run_has_results_and_a_picture(run):
    content = read_prompt_file(run / "prompts")
    results, pictures = run_card(run, content)
    assert results == json.loads((run / "results.json").read_text())
    assert list(pictures) == ["accuracy.png"]
    Image.open(BytesIO(pictures["accuracy.png"])).verify()
    card = model_card(
        content, "me/x", CardOptions(results=results, default_recipe=TrainSettings().to_dict()), pictures=(*pictures,)
    )
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("|")]
    cells = {row[1].strip(" `"): [cell.strip() for cell in row] for row in rows}
    for label, (name, count) in enumerate(zip(NAMES, [20, 8, 3], strict=True)):
        found = results["test"]["classes"][label]
        low, high = 100 * found["low"], 100 * found["high"]
        assert cells[name][2:4] == [str(count), f"{100 * found['accuracy']:.1f}"]
        assert cells[name][4:] == [f"{low:.1f} to {high:.1f}", "5"]
    assert '"crop_pct": 1.0,' in card  # --crop-pct 1 of the run
    assert "| `batch_size` | `16` | `128` |" in card
    assert f"divide the logits by {content.metadata.temperature:.4g} " in card


def test_a_run_without_other_splits_and_a_folder_that_is_no_run(pair_run, tmp_path):
    content = read_prompt_file(pair_run / "prompts")
    assert json.loads((pair_run / "results.json").read_text()) == {}
    assert run_card(pair_run, content) == run_card(tmp_path, content) == (None, {})
