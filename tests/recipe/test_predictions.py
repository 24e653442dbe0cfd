"""predictions.safetensors: recorded in the order of the split, written atomically, and read strictly."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import InputError, StateError
from lpt_peft.metrics import ShotMetrics
from lpt_peft.recipe import Splits, evaluate, fit, predict
from lpt_peft.recipe.predictions import PredictionRecorder, Predictions, read_predictions, write_predictions
from tests.processes import run_ranks
from tests.recipe.tiny import COUNTS, PHASE, SHORT, folder_with_a_broken_image, striped_data, tiny_adapter

BROKEN = 23


def record(model, dataset, **options):
    recorder = PredictionRecorder()
    metrics = ShotMetrics.from_rule("lpt", COUNTS)
    result = evaluate(model, dataset, metrics, batch_size=4, recorder=recorder, **options)
    return recorder.result, result


def images_in(folder):
    transform = transforms(tiny_adapter().backbone.preprocess(), train=False)
    return image_folder(folder, transform=transform, unreadable="skip")


def equal(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("phase", ["shared", "group"])
def test_recorded_predictions_are_those_of_the_model(phase):
    adapter = tiny_adapter()
    adapter.phase = phase
    dataset, labels = striped_data()
    found, result = record(adapter, dataset)
    output, target = predict(adapter, dataset)
    assert found.target.tolist() == target.tolist() == labels
    assert found.prediction.tolist() == output.logits.argmax(1).tolist()
    torch.testing.assert_close(found.probability, output.logits.softmax(1).amax(1))
    assert float(found.correct.float().mean()) == pytest.approx(result.accuracy)
    assert (found.position, found.images) == (None, None)
    assert found.groups is None if phase == "shared" else torch.equal(found.groups, output.groups)


def sharded(folder):
    """What each of two processes gets: for 7, 1 and 31 images, the last with an unreadable image."""
    adapter = tiny_adapter()
    adapter.phase = "group"
    images = striped_data()[0].tensors
    pieces = [TensorDataset(*(tensor[:size] for tensor in images)) for size in (7, 1)]
    return [record(adapter, dataset, distributed=True)[0] for dataset in [*pieces, images_in(folder)]]


def test_two_processes_record_each_image_once_in_order(tmp_path):
    folder_with_a_broken_image(tmp_path)
    first, second = run_ranks(sharded, tmp_path)
    expected = sharded(tmp_path)
    for ranks in zip(first, second, expected, strict=True):
        assert equal(ranks[0], ranks[1])
        assert equal(ranks[0][:2], ranks[2][:2])
        torch.testing.assert_close(ranks[0].probability, ranks[2].probability)
        assert equal(ranks[0][3:], ranks[2][3:])
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    assert expected[2].position.tolist() == [number for number in range(31) if number != BROKEN]
    assert expected[2].target.tolist() == labels[:BROKEN] + labels[BROKEN + 1 :]


def test_fit_writes_the_predictions_behind_its_results(tmp_path):
    folder_with_a_broken_image(tmp_path / "images")
    dataset, labels = striped_data()
    train = from_dataset(dataset, labels, ["ant", "bee", "cat"])
    settings = replace(SHORT, group=replace(PHASE, epochs=1))
    splits = Splits(train, striped_data(1)[0], images_in(tmp_path / "images"))
    results = fit(tiny_adapter(), splits, settings, tmp_path / "run", progress=False)
    found = read_predictions(tmp_path / "run" / "predictions.safetensors")
    assert list(found) == ["test", "validation"]
    for name, predictions in found.items():
        assert len(predictions.target) == results[name].num_images
        correct = torch.bincount(predictions.target[predictions.correct], minlength=3)
        total = torch.bincount(predictions.target, minlength=3)
        assert (correct / total).tolist() == pytest.approx(list(results[name].per_class))
        assert predictions.groups.shape == (results[name].num_images, 2)
    assert found["validation"].position is None
    assert BROKEN not in found["test"].position.tolist()
    assert json.loads(found["test"].images).keys() == {"class names_crc32", "image names_crc32"}
    file = tmp_path / "run" / "predictions.safetensors"
    before = file.read_bytes()
    fit(tiny_adapter(), splits, settings, tmp_path / "run", progress=False)
    assert file.read_bytes() == before


def test_a_run_without_splits_writes_a_file_without_predictions(tmp_path):
    dataset, labels = striped_data()
    train = from_dataset(dataset, labels, ["ant", "bee", "cat"])
    fit(tiny_adapter(), Splits(train), replace(SHORT, group=replace(PHASE, epochs=0)), tmp_path, progress=False)
    assert read_predictions(tmp_path / "predictions.safetensors") == {}


def some(size=3, **changes):
    values = {
        "target": torch.arange(size),
        "prediction": torch.zeros(size, dtype=torch.int64),
        "probability": torch.full((size,), 0.5),
    }
    return Predictions(**values | changes)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1, width=32)), max_size=8),
    st.integers(0, 3),
    st.booleans(),
    st.none() | st.text(max_size=5),
)
def test_round_trip(tmp_path_factory, rows, groups, left_out, images):
    target, prediction, probability = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    written = Predictions(
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(prediction, dtype=torch.int64),
        torch.tensor(probability, dtype=torch.float32),
        torch.ones(len(rows), groups, dtype=torch.int64) if groups else None,
        torch.arange(len(rows)) * 2 if left_out else None,
        images,
    )
    path = tmp_path_factory.mktemp("predictions") / "file"
    write_predictions(path, {"test": written, "validation": written})
    first = path.read_bytes()
    found = read_predictions(path)
    assert all(equal(found[name], written) for name in ("test", "validation"))
    write_predictions(path, {"validation": found["validation"], "test": found["test"]})
    assert path.read_bytes() == first


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    write_predictions(tmp_path / "file", {"test": some()})
    before = (tmp_path / "file").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_predictions(tmp_path / "file", {"test": some(4)})
    assert (tmp_path / "file").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


WRONG = {
    "unknown name": ({"test.logits": torch.zeros(3)}, "the tensor 'test.logits'"),
    "unknown split": ({"new.target": torch.zeros(3)}, "the tensor 'new.target'"),
    "dtype": ({"test.target": torch.zeros(3)}, r"test.target must be int64 \(N,\) with N=3, not torch.float32"),
    "length": ({"test.prediction": torch.zeros(2, dtype=torch.int64)}, r"test.prediction must be int64 .* \(2,\)"),
    "shape": ({"test.groups": torch.zeros(3, dtype=torch.int64)}, r"test.groups must be int64 \(N, k\) with N=3"),
    "negative": ({"test.target": torch.tensor([0, -1, 0])}, "test.target must be at least 0"),
    "probability": ({"test.probability": torch.tensor([0.1, 1.5, 0.2])}, "test.probability must be at most 1"),
    "nan": ({"test.probability": torch.tensor([0.1, float("nan"), 0.2])}, "at most 1, and not NaN"),
    "position": ({"test.position": torch.tensor([0, 2, 2])}, "test.position must be in ascending order"),
}


@pytest.mark.parametrize("change", WRONG)
def test_a_changed_file_is_refused(tmp_path, change):
    tensors, words = WRONG[change]
    write_predictions(tmp_path / "file", {"test": some()})
    save_file(load_file(tmp_path / "file") | tensors, tmp_path / "file", about())
    with pytest.raises(InputError, match=words):
        read_predictions(tmp_path / "file")


def about(**changes):
    return {"lpt_peft": json.dumps({"format_version": 1, "images": {}} | changes)}


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"test.target": torch.zeros(1, dtype=torch.int64)}, tmp_path / "file", about())
    with pytest.raises(InputError, match="test.prediction must be in the file"):
        read_predictions(tmp_path / "file")


@pytest.mark.parametrize("metadata", [None, {"lpt_peft": "{"}, about(format_version=2), about(images=[])])
def test_files_without_the_metadata_are_refused(tmp_path, metadata):
    save_file({"test.target": torch.zeros(1, dtype=torch.int64)}, tmp_path / "file", metadata)
    with pytest.raises(InputError, match="format 1|is not strict JSON"):
        read_predictions(tmp_path / "file")


def test_damaged_and_missing_files_are_named(tmp_path):
    (tmp_path / "file").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="file cannot be read: .*Remove it"):
        read_predictions(tmp_path / "file")
    with pytest.raises(StateError, match="none does not exist: the run is not finished"):
        read_predictions(tmp_path / "none")
