"""Predictions of rare classes only, and the warning of a run."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from lpt_peft.recipe import run_phase, train
from lpt_peft.recipe.loading.batches import steps_per_epoch
from lpt_peft.recipe.training.rare_predictions import RarePredictionMonitor
from tests.host_reads import count_host_reads
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    SHORT,
    striped_data,
    tiny_adapter,
)

SHARED_ONLY = replace(SHORT, group=replace(PHASE, epochs=0))


def run(settings=SHARED_ONLY, **options):
    dataset, labels = striped_data()
    return train(tiny_adapter(), dataset, labels, settings, **options)


LABELS = [0] * 60 + [1] * 25 + [2] * 10 + [3] * 5


def predictions(*classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


@pytest.mark.parametrize(
    ("predicted", "warned"),
    [
        (LABELS, False),
        ([3] * 100, True),
        ([1] * 50 + [2] * 50, True),
        ([0] * 12 + [2] * 88, True),  # 60 % of images, a quarter of guesses among four classes
        ([0] * 13 + [2] * 87, False),
        ([0] * 100, False),
    ],
)
def test_predictions_of_rare_classes_only(predicted, warned):
    monitor = RarePredictionMonitor(LABELS, 4, torch.device("cpu"))
    assert monitor.num_frequent == 1
    for half in range(2):  # in two batches
        monitor.update(predictions(*predicted[half::2]), torch.tensor(LABELS[half::2]))
    found = monitor.check()
    assert (found is not None) == warned
    if warned:
        assert found == (predicted.count(0) / 100, 0.6, 1)
    assert monitor.check() is None, "counts are reset"


def test_random_predictions_of_many_classes_are_no_collapse():
    """A class of half the images among 100: guessing names it in 1 % of cases."""
    labels = [0] * 99 + list(range(1, 100))
    monitor = RarePredictionMonitor(labels, 100, torch.device("cpu"))
    assert monitor.num_frequent == 1
    logits = torch.eye(100).repeat_interleave(2, 0)
    monitor.update(logits[: len(labels)], torch.tensor(labels))
    assert monitor.check() is None
    logits[:2] = logits[2]
    monitor.update(logits[: len(labels)], torch.tensor(labels))
    assert monitor.check() is not None


def test_the_frequent_classes_cover_half_of_the_images():
    for counts, expected in (([5, 5], 1), ([4, 3, 3], 2), ([1] * 10, 5), ([9, 1, 0], 1)):
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        assert RarePredictionMonitor(labels, len(counts), torch.device("cpu")).num_frequent == expected


def test_counting_predictions_reads_nothing_from_the_device():
    monitor = RarePredictionMonitor(LABELS, 4, torch.device("cpu"))
    batch = predictions(*LABELS), torch.tensor(LABELS)
    with count_host_reads() as reads:
        monitor.update(*batch)
    assert not reads


class Collapsing(torch.nn.Module):
    """A model that only names class 2."""

    def __init__(self):
        super().__init__()
        self.head = tiny_adapter().head

    def forward(self, images, return_output):
        output = tiny_adapter()(images, return_output=True)
        logits = self.head(output.features.detach()) * 0 + torch.tensor([0.0, 0.0, 1.0])
        return output._replace(logits=logits)


@pytest.mark.parametrize("shown", [True, False])
def test_a_collapsed_run_is_warned_of_once(capsys, shown):
    dataset, labels = striped_data()
    settings = replace(SETTINGS, loss="cross_entropy", batch_size=120)
    assert steps_per_epoch(len(labels), settings) * 60 >= 50, "fewer images are not judged"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_phase(Collapsing(), dataset, labels, settings, PHASE, name="shared", progress=shown)
    messages = [str(item.message) for item in caught if "rare classes" in str(item.message)]
    if shown:
        assert not messages
        messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(messages) == 1
    assert (
        "In epoch 2 of phase shared, 0.0 % of the predictions on training images name the 1 most frequent"
        in messages[0]
    )
    assert "Lower learning_rate (now 2)" in messages[0]


def test_a_good_run_is_not_warned_of(capsys):
    run(replace(SHARED_ONLY, shared=replace(PHASE, epochs=6), batch_size=128))
    assert "rare classes" not in capsys.readouterr().err
