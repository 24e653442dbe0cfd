"""lpt-peft without settings: a run from start to end, starts from other files, and what is refused with its cure."""

from __future__ import annotations

import json

import pytest
import torch

from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.cli import main
from lpt_peft.recipe.training.phase import PhaseRun
from tests.cli.runs import BACKBONE, same_prompts, saved_prompts, write_images

SHORT = ["--shared.epochs", "2", "--batch-size", "16"]  # the defaults, in less time
GLYPH = ["--backbone", "glyph_vit", *SHORT]


@pytest.fixture(scope="module")
def default_run(data, tmp_path_factory):
    """A finished run without settings; not to be changed."""
    output = tmp_path_factory.mktemp("default")
    assert main(["train", str(data), "--output", str(output), *GLYPH]) == 0
    return output


def test_the_prompt_file_of_a_run_without_settings(default_run, data, capsys):
    content = read_prompt_file(default_run / "prompts")
    recipe = content.metadata.training["recipe"]
    assert (content.config.query, content.phase) == ("block_k", "group")
    rates = [recipe["shared"]["learning_rate"], recipe["shared"]["head_learning_rate"]]
    assert (recipe["phases"], recipe["optimizer"], *rates) == ("joint", "adamw", 0.01, 0.01)
    assert recipe["group"]["pool_learning_rate"] == 0.03
    assert json.loads((default_run / "settings.json").read_text())["training"]["shared"]["learning_rate"] is None
    results = json.loads((default_run / "results.json").read_text())
    assert main(["evaluate", str(default_run), str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    image = str(next((data / "test").rglob("*.png")))
    assert main(["predict", str(default_run), image]) == 0
    assert main(["inspect", str(default_run)]) == 0
    assert "query block_k" in capsys.readouterr().out


def test_the_report_shows_the_rates_that_were_used(default_run, data, tmp_path):
    assert main(["report", str(default_run), str(data), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "training.group.pool_learning_rate" in page
    assert "0.06" in page


@pytest.mark.parametrize("step", [2, 6])
def test_an_interrupted_run_resumes_to_the_last_bit(default_run, data, tmp_path, monkeypatch, step):
    original = PhaseRun.training_step

    def failing(run, *arguments):
        if run.step == step:
            raise RuntimeError
        return original(run, *arguments)

    words = ["train", str(data), "--output", str(tmp_path / "run"), *GLYPH]
    with monkeypatch.context() as patch:
        patch.setattr(PhaseRun, "training_step", failing)
        with pytest.raises(RuntimeError):
            main(words)
    assert main(words) == 0
    assert same_prompts(default_run, tmp_path / "run")


STARTS = {
    "all of it": ([], "keys k-means centers of the queries; groups tokens of the images nearest to their keys"),
    "phase 1": (["--phases", "shared"], ""),
    "both phases": (["--phases", "decoupled", "--group.epochs", "1"], "groups tokens of the images"),
    "vpt_deep": (["--method", "vpt_deep"], ""),
    "final query": (["--query", "final"], "groups tokens of the images"),
}


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize(("flags", "starts"), STARTS.values(), ids=STARTS)
def test_a_run_starts_from_a_full_prompt_file(default_run, tmp_path, capsys, flags, starts, classes):
    names = ["ant", "bee", "cat", "dog"][:classes]
    folder = write_images(tmp_path / "others", [6, 4, 3, 2][:classes], seed=5, names=names)
    words = ["train", str(folder), "--output", str(tmp_path / "run"), *GLYPH, "--shared.epochs", "1", *flags]
    assert main([*words, "--start-from", str(default_run)]) == 0
    found = capsys.readouterr().err
    assert f"shared prompt as loaded from {default_run}" in found
    assert starts in found


@pytest.mark.parametrize("method", ["lpt", "vpt_deep"])
def test_a_run_starts_from_a_file_of_phase_shared(data, tmp_path, capsys, method):
    words = ["train", str(data), *GLYPH, "--shared.epochs", "1"]
    assert main([*words, "--output", str(tmp_path / "first"), "--phases", "shared"]) == 0
    more = ["--start-from", str(tmp_path / "first"), "--shared.learning-rate", "1e-12", "--method", method]
    assert main([*words, "--output", str(tmp_path / "second"), *more]) == 0
    assert f"shared prompt as loaded from {tmp_path / 'first'}" in capsys.readouterr().err
    first, second = (saved_prompts(tmp_path / name)["shared.prompts"] for name in ("first", "second"))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_phase_1_alone_is_a_flag_and_the_old_way_names_it(data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), *GLYPH]
    assert main([*words, "--group.epochs", "0"]) == 1
    assert 'phases="shared" trains phase 1 alone' in capsys.readouterr().err
    assert main([*words, "--shared.epochs", "0"]) == 1
    assert 'phases="decoupled" trains the groups alone' in capsys.readouterr().err
    assert main([*words, "--shared.epochs", "1", "--phases", "shared"]) == 0
    assert read_prompt_file(tmp_path / "prompts").phase == "shared"


def test_settings_of_group_without_effect_are_named(data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), *GLYPH, "--shared.epochs", "1"]
    assert main([*words, "--group.epochs", "3", "--group.learning-rate", "1"]) == 0
    message = 'group.epochs, group.learning_rate: no effect, because phase "joint" trains with the settings of shared'
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "linear_probe", "full"])
def test_every_method_without_settings(data, tmp_path, method, capsys):
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SHORT, "--method", method]
    assert main(words) == 0
    assert "no effect" not in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), str(data), "--json"]) == 0


def test_the_preset_of_the_paper_is_unchanged_by_defaults(data, tmp_path):
    words = ["train", str(data), "--output", str(tmp_path), *GLYPH, "--preset", "paper", "--group.epochs", "1"]
    assert main(words) == 0
    content = read_prompt_file(tmp_path / "prompts")
    assert content.config.query == "final"
    recipe = content.metadata.training["recipe"]
    rates = [
        phase[name] for phase in (recipe["shared"], recipe["group"]) for name in ("learning_rate", "head_learning_rate")
    ]
    assert rates == [0.02] * 4
    assert (recipe["optimizer"], recipe["phases"], recipe["group"]["pool_learning_rate"]) == ("sgd", "decoupled", 0.02)
