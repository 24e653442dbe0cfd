"""Output of a run on stderr: bar or lines, notes and warnings."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import tqdm.notebook
from torch.utils.data import TensorDataset

from lpt_peft.data.folder import image_folder
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import ConfigError
from lpt_peft.recipe import make_accelerator, progress, run_phase, train
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.training import phase_init
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    SHORT,
    FailingLoss,
    PowerCut,
    folder_with_a_broken_image,
    noisy_validation,
    striped_data,
    tiny_adapter,
)

LINE = re.compile(
    r"shared: epoch (\d+)/2, step (\d+)/8, loss [\d.]+, learning rate [\d.e-]+(?:, validation [\d.]+ %)?, "
    r"[\d.e+]+ images/s, \d+:\d\d:\d\d left"
)
SHARED_ONLY = replace(SHORT, group=replace(PHASE, epochs=0))


def run(settings=SHARED_ONLY, **options):
    dataset, labels = striped_data()
    return train(tiny_adapter(), dataset, labels, settings, **options)


def test_a_run_without_a_terminal_prints_a_line_per_epoch(capsys):
    run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shared: ")]
    assert [LINE.fullmatch(line).groups() for line in lines] == [("1", "4"), ("2", "8")]
    run(validation=striped_data(1)[0], progress="stripes")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stripes: shared: ")]
    assert len(lines) == 2
    assert all("validation" in line for line in lines)


def test_a_run_on_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "has_bar", lambda: True)
    run(progress="stripes")
    shown = capsys.readouterr().err
    assert "stripes: shared: 100%" in shown
    assert "images/s" not in shown


class Stream(list):
    """A replacement of stderr."""

    def __init__(self, terminal=False):
        super().__init__()
        self.isatty = lambda: terminal
        self.write, self.flush = self.append, lambda: None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_needs_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    assert progress.has_bar() == terminal


def test_a_notebook_has_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", tqdm.notebook.tqdm)
    monkeypatch.setattr(sys, "stderr", Stream())
    assert progress.has_bar()


def test_a_run_without_progress_prints_nothing(capsys):
    run(progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_long_epoch_prints_a_line_every_few_minutes(capsys, monkeypatch):
    seconds = iter(range(0, 10**6, 200))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    reports = []

    def current():
        reports.append(0)
        return {"loss": 1.5, "learning_rate": 0.01}

    with Reporter(True, True).phase("shared", steps=20, steps_per_epoch=10, start=0, images=32, later=100) as shown:
        for step in range(1, 10):
            shown.step(step, current)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 9, "each call of the clock advances it by 200 seconds"
    assert len(reports) == len(lines), "values are only read for a line"
    assert lines[0].startswith("shared: epoch 1/2, step 2/20, loss 1.5, learning rate 0.01, ")


def test_images_per_second_and_remaining_time(capsys, monkeypatch):
    """10 steps in 5 seconds, of which 10 remain, and 100 in later phases."""
    seconds = iter([100.0, 105.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with Reporter(True, True).phase("shared", steps=25, steps_per_epoch=5, start=5, images=32, later=100) as shown:
        shown.epoch(15, {"loss": 1.0, "learning_rate": 0.1})
    assert capsys.readouterr().err.endswith(
        "epoch 3/5, step 15/25, loss 1, learning rate 0.1, 64 images/s, 0:00:55 left\n"
    )


def test_a_resumed_run_says_so(tmp_path, capsys):
    with pytest.raises(PowerCut):
        run(criterion=FailingLoss(5), checkpoints=tmp_path, progress=False)
    run(criterion=FailingLoss(), checkpoints=tmp_path)
    assert f"Resuming phase shared after step 4, saved in {tmp_path}/1-shared-00000004\n" in capsys.readouterr().err


def test_early_stopping_and_the_best_epoch_are_noted(capsys):
    settings = replace(SHARED_ONLY, shared=replace(PHASE, epochs=8), patience=2, keep="best")
    history = run(settings, validation=noisy_validation())
    shown = capsys.readouterr().err
    scores = [record["validation"]["overall"] for record in history]
    best = scores.index(max(scores))
    assert f"shared: ended after {best + 3} of 8 epochs, since 2 validations did not improve" in shown
    expected = (
        f"the result is that of the best validation (epoch {best + 1}, balanced accuracy {100 * max(scores):.1f} %)"
    )
    assert expected in shown


def test_run_phase_refuses_settings_that_need_validation():
    dataset, labels = striped_data()
    for change in ({"keep": "best"}, {"patience": 2}):
        with pytest.raises(ConfigError, match="need validation, which run_phase does not do"):
            run_phase(tiny_adapter(), dataset, labels, replace(SETTINGS, **change), PHASE, progress=False)


def test_clipped_steps_are_in_the_history():
    assert all(record["clipped"] == 1.0 for record in run(replace(SHARED_ONLY, clip_norm=1e-6), progress=False))
    assert all(record["clipped"] == 0.0 for record in run(replace(SHARED_ONLY, clip_norm=1e6), progress=False))
    assert "clipped" not in run(progress=False)[0]


def test_too_few_distinct_queries_keep_random_keys_with_a_warning():
    """Found after the first phase, so the run must not fail."""
    images = torch.cat([torch.full((20, 3, 32, 32), 0.5), torch.full((11, 3, 32, 32), -0.5)])
    labels = [0] * 20 + [1] * 8 + [2] * 3
    adapter = tiny_adapter()
    keys = adapter.pool.keys.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        phase_init.begin_phase(
            adapter,
            "group",
            TensorDataset(images, torch.tensor(labels)),
            SETTINGS,
            accelerator=make_accelerator(SETTINGS),
            reporter=Reporter(False, True),
        )
    assert torch.equal(adapter.pool.keys, keys)
    [warning] = caught
    assert str(warning.message).startswith("The training images give 2 distinct queries for 4 groups, too few")


def test_groups_that_were_never_selected_are_named(capsys):
    adapter = tiny_adapter()
    dataset, labels = striped_data()
    with torch.no_grad():
        adapter.phase = "group"
        query = adapter.features(dataset.tensors[0]).mean(0)
        adapter.pool.keys[:3], adapter.pool.keys[3] = query, -query
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=0), group=replace(PHASE, epochs=1), init_keys="random")
    train(adapter, dataset, labels, settings)
    assert adapter.pool.dead_groups() == [3]
    assert "group: 1 of 4 groups were never selected: 3\n" in capsys.readouterr().err


def test_unknown_usage_of_a_prompt_file_is_counted_from_zero():
    adapter = tiny_adapter()
    adapter.pool.load_usage(None)
    dataset, labels = striped_data()
    train(adapter, dataset, labels, SHORT, progress=False)
    assert int(adapter.pool.usage.sum()) == 2 * 16 * 8, "two groups per image"
    assert min(adapter.pool.usage) >= 0


def test_removed_checkpoints_are_reported(tmp_path, capsys):
    run(checkpoints=tmp_path, progress=False)
    run(checkpoints=tmp_path, resume=False)
    assert f"Removed 2 checkpoints of an earlier run in {tmp_path}\n" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_once_at_the_end(tmp_path, capsys, caplog, workers):
    folder_with_a_broken_image(tmp_path)
    adapter = tiny_adapter()
    transform = transforms(adapter.backbone.preprocess(), train=True)
    images = image_folder(tmp_path, transform=transform, unreadable="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(adapter, images, images.labels, replace(SHARED_ONLY, num_workers=workers))
    assert not caplog.records
    assert images.unreadable_images.announce
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if "23.png" in line]
    assert len(found) == 1
    assert found[0] == lines[-1]
    assert found[0].startswith("warning: train: 1 of 31 images cannot be read")
    assert not [item for item in caught if "23.png" in str(item.message)]
    assert lines[0] == "Training: 31 images of 3 classes; largest class class 0 (20), smallest class class 2 (3)"
