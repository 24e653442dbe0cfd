"""Errors for invalid data and settings, before the first step where possible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from lpt_peft import LongTailPromptAdapter, LPTLoss, ShotMetrics
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.recipe import PhaseSettings, TrainSettings, evaluate, predict, run_phase, train
from lpt_peft.recipe.training.phase import PhaseRun
from tests.conftest import tiny_vit
from tests.recipe.tiny import PHASE, SETTINGS, folder_with_a_broken_image, result_of, same, striped_data, tiny_adapter

IMAGES, LABELS = striped_data()[0].tensors[0], striped_data()[1]
CROSS_ENTROPY = replace(SETTINGS, loss="cross_entropy", sampling="instance")


def data(images=IMAGES, labels=LABELS):
    return TensorDataset(images, torch.tensor(labels))


class Pairs(Dataset):
    """Given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def sizes(*shapes):
    """Images of alternating shapes."""
    return Pairs([(torch.zeros(shapes[i % len(shapes)]), label) for i, label in enumerate(LABELS)])


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(PhaseRun, "training_step", lambda *args: pytest.fail("a step was done"))


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        (LABELS[:3], SETTINGS, "3 labels do not fit a dataset of 31 items"),
        ([0 if label == 2 else label for label in LABELS], SETTINGS, r"1 of 3 classes have no image.*class 2\. .*=2\)"),
        ([0 if label == 1 else label for label in LABELS], SETTINGS, "the first is class 1.*without gaps"),
        ([0] * 31, SETTINGS, "All 31 images have class 0"),
        ([2] * 31, CROSS_ENTROPY, "All 31 images have class 2"),
        ([*LABELS[:-1], 3], SETTINGS, r"labels\[30\] is 3, but the head has 3 classes.*num_classes=4"),
        ([*LABELS[:-1], 3], CROSS_ENTROPY, r"labels\[30\] is 3, but the head has 3 classes"),
        ([*LABELS[:-1], 10**15], SETTINGS, "is 1000000000000000, but the head has 3"),
        ([*LABELS[:-1], -1], CROSS_ENTROPY, r"labels\[30\] is -1"),
        ([float(label) for label in LABELS], CROSS_ENTROPY, "integers, not float64"),
        (LABELS[::-1], SETTINGS, r"dataset\[0\] has class 0, but labels\[0\] is 2"),
    ],
)
def test_labels(no_step, labels, settings, words):
    with pytest.raises(InputError, match=words):
        train(tiny_adapter(), data(), labels, settings, progress=False)
    with pytest.raises(InputError, match=words):
        run_phase(tiny_adapter(), data(), labels, settings, PHASE, progress=False)


def test_no_images(no_step):
    with pytest.raises(InputError, match="labels are empty"):
        train(tiny_adapter(), Pairs([]), [], SETTINGS, progress=False)


def test_classes_without_images_are_accepted_if_the_loss_uses_no_counts():
    """Cross-entropy, and a custom criterion."""
    labels = [0 if label == 1 else label for label in LABELS]
    phase = {"shared": replace(PHASE, epochs=1), "group": replace(PHASE, epochs=0)}
    train(tiny_adapter(), data(labels=labels), labels, replace(CROSS_ENTROPY, **phase), progress=False)

    def criterion(output, target, epoch):
        return torch.nn.functional.cross_entropy(output.logits, target)

    train(tiny_adapter(), data(labels=labels), labels, replace(SETTINGS, **phase), criterion=criterion, progress=False)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (sizes((3, 48, 48)), r"dataset\[0\], an image of shape \(3, 48, 48\) and torch.float32: .*Input height \(48\)"),
        (sizes((1, 32, 32)), r"image of shape \(1, 32, 32\)"),
        (sizes((32, 32)), r"image of shape \(32, 32\)"),
        (data(images=IMAGES.double()), "and torch.float64: "),
        (data(images=IMAGES.byte()), "and torch.uint8: "),
        (
            Pairs([(Image.new("RGB", (32, 32)), label) for label in LABELS]),
            "are Image, not tensors: give it a transform",
        ),
        (Pairs([(image, label, 0) for image, label in zip(IMAGES, LABELS, strict=True)]), "must be pairs"),
        (Pairs(list(IMAGES)), "must be pairs"),
    ],
)
def test_images_that_the_model_rejects(no_step, dataset, words):
    with pytest.raises(InputError, match=words):
        train(tiny_adapter(), dataset, LABELS, SETTINGS, progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_sizes(workers):
    mixed = sizes((3, 32, 32), (3, 40, 32))
    words = r"differ in shape: \(3, 32, 32\), \(3, 40, 32\)\. Transform them to a common size"
    with pytest.raises(InputError, match=words):
        train(tiny_adapter(), mixed, LABELS, replace(SETTINGS, num_workers=workers), progress=False)
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=1))
    with pytest.raises(InputError, match=words):
        train(tiny_adapter(), data(), LABELS, settings, validation=mixed, progress=False)


def test_the_check_of_the_first_image_leaves_no_trace(monkeypatch):
    """At the first step prompts, head and usage are unchanged."""
    seen = []

    def record(run, *args):
        seen.append(result_of(run.model))
        raise StateError("seen")

    monkeypatch.setattr(PhaseRun, "training_step", record)
    adapter = tiny_adapter()
    before = result_of(adapter)
    adapter.phase = "group"
    with pytest.raises(StateError, match="seen"):
        train(adapter, data(), LABELS, SETTINGS, progress=False)
    assert same(seen[0], before)


def test_unreadable_image_is_named(tmp_path):
    folder_with_a_broken_image(tmp_path)
    adapter = tiny_adapter()
    images = image_folder(tmp_path, transform=transforms(adapter.backbone.preprocess(), train=True))
    with pytest.raises(InputError, match=r"class 1/23\.png \(index 23\) cannot be read"):
        train(adapter, images, images.labels, SETTINGS, progress=False)


def test_a_loss_for_a_different_number_of_classes():
    with pytest.raises(InputError, match="logits have 3 columns, but class_counts has 4 entries"):
        train(tiny_adapter(), data(), LABELS, SETTINGS, criterion=LPTLoss([20, 8, 2, 1], 4), progress=False)


def test_class_counts_of_another_head_are_not_saved(tmp_path):
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3)
    with pytest.raises(InputError, match="class_counts"):
        adapter.save_pretrained(tmp_path, class_counts=[20, 8])
    assert not list(tmp_path.iterdir())


def test_nan_stops_and_names_the_step():
    broken = data(torch.full_like(IMAGES, float("nan")))
    with pytest.raises(StateError, match=r"loss became nan in step 0 .epoch 0. of phase shared"):
        train(tiny_adapter(), broken, LABELS, SETTINGS, progress=False)


def test_settings():
    with pytest.raises(ConfigError, match="learning_rate=0"):
        PhaseSettings(learning_rate=0)
    with pytest.raises(ConfigError, match="batch_size=0 must be even and at least 2"):
        TrainSettings(batch_size=0)
    with pytest.raises(ConfigError, match='needs sampling="dual"'):
        TrainSettings(sampling="instance")


def test_nothing_to_predict():
    with pytest.raises(InputError, match="dataset is empty"):
        predict(tiny_adapter(), Pairs([]))


def test_labels_of_any_integer_type():
    phases = {"shared": replace(PHASE, epochs=1), "group": replace(PHASE, epochs=0)}
    results = []
    for labels in (LABELS, np.array(LABELS, dtype=np.uint16), torch.tensor(LABELS, dtype=torch.uint8)):
        adapter = tiny_adapter()
        train(adapter, data(), labels, replace(SETTINGS, **phases), progress=False)
        results.append(result_of(adapter))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_evaluation_of_images_without_a_transform():
    plain = Pairs([(Image.new("RGB", (32, 32)), 0)])
    with pytest.raises(InputError, match="are Image, not tensors"):
        evaluate(tiny_adapter(), plain, ShotMetrics([1, 1, 1]))


def test_labels_must_be_those_of_the_data_set(no_step):
    """Not only that of the first image, which is all that can be compared for other data sets."""
    images = from_dataset(TensorDataset(IMAGES), LABELS)
    wrong = [*LABELS[:20], 2, *LABELS[21:]]
    with pytest.raises(InputError, match=r"labels\[20\] is 2, but dataset\.labels\[20\] is 1: pass labels=dataset"):
        train(tiny_adapter(), images, wrong, SETTINGS, progress=False)
