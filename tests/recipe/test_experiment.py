"""fit: errors that are found before training, and a final save that fails."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lpt_peft import LongTailPromptAdapter
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import ConfigError, InputError, LPTError, PromptFileExistsError, StateError
from lpt_peft.recipe import Splits, experiment, fit, train
from lpt_peft.recipe.resume.folders import check_folder
from lpt_peft.recipe.training.optimizer import PhaseOptimizer
from lpt_peft.recipe.training.phase import PhaseRun
from tests.recipe.tiny import PHASE, SHORT, folder_with_a_broken_image, result_of, same, striped_data, tiny_adapter

NAMES = ["ant", "bee", "cat"]
SHARED_ONLY = replace(SHORT, group=replace(PHASE, epochs=0))


def splits(names=NAMES, validation=None, test=None):
    dataset, labels = striped_data()
    return Splits(from_dataset(dataset, labels, names), validation, striped_data(2)[0] if test is None else test)


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(PhaseRun, "training_step", lambda *args: pytest.fail("a step was done"))


@pytest.mark.parametrize("name", ["", "x" * 100_000, "a\nb", "\ud800"])
def test_class_names_that_cannot_be_saved_are_found_before_training(no_step, tmp_path, name):
    with pytest.raises(LPTError):
        fit(tiny_adapter(), splits(["ant", "bee", name]), SHARED_ONLY, tmp_path / "run", progress=False)


class Labelled(TensorDataset):
    """Images with the attribute `labels`."""

    def __init__(self, images, labels):
        super().__init__(images, torch.tensor(labels))
        self.labels = labels


WRONG_SPLITS = [
    (Subset(striped_data()[0], []), "split has no images"),
    (TensorDataset(torch.zeros(2, 3, 40, 32), torch.tensor([0, 1])), r"split: dataset\[0\], an image of shape"),
    (Labelled(torch.zeros(2, 3, 32, 32), [0, 3]), "Label 3 of the .* split is outside"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG_SPLITS)
@pytest.mark.parametrize("name", ["validation", "test"])
def test_splits_that_cannot_be_evaluated_are_found_before_training(no_step, tmp_path, name, wrong, words):
    with pytest.raises(InputError, match=f"(?s){name}.*{words}|{words}") as error:
        fit(tiny_adapter(), splits(**{name: wrong}), SHARED_ONLY, tmp_path, progress=False)
    assert f"{name} split" in str(error.value)


def test_an_output_folder_that_cannot_be_written_is_found_before_training(no_step, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="file"):
            fit(tiny_adapter(), splits(), SHARED_ONLY, folder, progress=False)

    def refuse(self, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StateError, match="is not writable: Read-only file system"):
        fit(tiny_adapter(), splits(), SHARED_ONLY, tmp_path / "run", progress=False)
    dataset, labels = striped_data()
    with pytest.raises(StateError, match="is not writable: Read-only file system"):
        train(tiny_adapter(), dataset, labels, SHARED_ONLY, checkpoints=tmp_path / "run", progress=False)


def test_a_prompt_folder_of_another_library_is_found_before_training(no_step, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(PromptFileExistsError, match="does not belong to a prompt file"):
        fit(tiny_adapter(), splits(), SHARED_ONLY, tmp_path, progress=False)


def image_splits(folder, **options):
    """The same folder three times, with transforms of these options."""
    if not folder.exists():
        folder_with_a_broken_image(folder)
    preprocess = tiny_adapter().backbone.preprocess()
    options = {"train": {}, "validation": {}, "test": {}, **options}
    transform = {name: transforms(preprocess, train=name == "train", **given) for name, given in options.items()}
    return Splits(**{n: image_folder(folder, transform=t, unreadable="skip") for n, t in transform.items()})


def test_the_reading_of_images_is_stored_in_the_prompt_file(tmp_path):
    choice = {"exif": False, "background": (1, 2, 3)}
    images = image_splits(tmp_path / "images", train=choice, validation=choice, test=choice)
    fit(tiny_adapter(), images, SHARED_ONLY, tmp_path / "run", progress=False)
    preprocess = json.loads((tmp_path / "run" / "prompts" / "config.json").read_text())["preprocess"]
    assert (preprocess["exif"], preprocess["background"]) == (False, [1, 2, 3])
    fit(tiny_adapter(), splits(), SHARED_ONLY, tmp_path / "default", progress=False)
    preprocess = json.loads((tmp_path / "default" / "prompts" / "config.json").read_text())["preprocess"]
    assert (preprocess["exif"], preprocess["background"]) == (True, [255, 255, 255])


@pytest.mark.parametrize("name", ["validation", "test"])
def test_splits_must_be_read_as_the_training_images(no_step, tmp_path, name):
    images = image_splits(tmp_path / "images", **{name: {"exif": False}})
    with pytest.raises(ConfigError, match=f"the {name} split with .*give all transforms the same exif"):
        fit(tiny_adapter(), images, SHARED_ONLY, tmp_path / "run", progress=False)


def test_the_probe_leaves_nothing(tmp_path):
    check_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("failing", ["prompts", "history", "results"])
def test_a_final_save_that_failed_is_repeated_by_the_next_run(tmp_path, monkeypatch, failing):
    """A full disk at the end: the run is complete on disk, and finishes without another step."""
    expected = tiny_adapter()
    results = fit(expected, splits(), SHARED_ONLY, tmp_path / "expected", progress=False)
    saved = LongTailPromptAdapter.save_pretrained
    written = experiment.write_json

    def full(*args):
        raise StateError("No space left on device")

    def failing_save(self, folder, *, is_main_process, **content):
        return full() if is_main_process else saved(self, folder, is_main_process=False, **content)

    def failing_json(path, content):
        return full() if path.stem == failing else written(path, content)

    with monkeypatch.context() as patch:
        if failing == "prompts":
            patch.setattr(LongTailPromptAdapter, "save_pretrained", failing_save)
        patch.setattr(experiment, "write_json", failing_json)
        with pytest.raises(StateError, match="No space left"):
            fit(tiny_adapter(), splits(), SHARED_ONLY, tmp_path / "run", progress=False)
    monkeypatch.setattr(PhaseRun, "training_step", lambda *args: pytest.fail("a step was done"))
    adapter = tiny_adapter()
    assert fit(adapter, splits(), SHARED_ONLY, tmp_path / "run", progress=False) == results
    assert same(result_of(adapter), result_of(expected))
    for file in ("history.json", "results.json", "prompts/prompts.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_a_full_disk_at_the_end_names_the_file(tmp_path, monkeypatch):
    """The system's own error, at the first write after the last checkpoint."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    adapter = tiny_adapter()
    original = experiment.evaluate

    def evaluate_then_fill(*args, **options):
        monkeypatch.setattr(os, "fsync", full)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", evaluate_then_fill)
        with pytest.raises((LPTError, OSError), match="No space left on device") as error:
            fit(adapter, splits(), SHARED_ONLY, tmp_path, progress=False)
        monkeypatch.undo()
    assert isinstance(error.value, LPTError), repr(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "checkpoints" / "1-shared-00000008").is_dir()


def test_a_training_record_of_the_largest_size_is_tried(tmp_path):
    fit(tiny_adapter(), splits(validation=striped_data(1)[0]), SHARED_ONLY, tmp_path, progress=False)
    record = json.loads((tmp_path / "prompts" / "config.json").read_text())["training"]
    assert set(record["metrics"]) == {"validation", "test"}
    assert record["rule"] == "many: n > 100, medium: 20 < n <= 100, few: n <= 20; mean over classes"


def test_an_unreadable_test_image_is_named_at_the_end(tmp_path, capsys):
    folder_with_a_broken_image(tmp_path)
    adapter = tiny_adapter()
    transform = transforms(adapter.backbone.preprocess(), train=False)
    test = image_folder(tmp_path, transform=transform, unreadable="skip")
    fit(adapter, splits(test=test), SHARED_ONLY, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "23.png" in line] == lines[-2:-1]
    assert lines[-1] == f"Files that were left out or cannot be read: {tmp_path / 'run' / 'left_out.json'}"


# Gradients


def test_gradients_left_by_the_caller_are_not_added():
    """A gradient of 1000 in a trained and in a frozen parameter."""
    dataset, labels = striped_data()
    clean, dirty = tiny_adapter(), tiny_adapter()
    for parameter in dirty.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    for adapter in (clean, dirty):
        train(adapter, dataset, labels, replace(SHORT, clip_norm=0.5), progress=False)
    assert same(result_of(clean), result_of(dirty))
    assert all(parameter.grad is None for parameter in dirty.parameters())


def test_clipping_only_sees_the_gradients_of_the_phase(monkeypatch):
    """In each step of both phases, the clipped norm equals that of the gradients of the trained parameters."""
    norms, expected = [], []
    clip, update = torch.nn.utils.clip_grad_norm_, PhaseOptimizer.update
    adapter = tiny_adapter()
    trained = {"shared": {"shared.prompts", "head.weight"}, "group": {"pool.prompts", "pool.keys", "head.weight"}}

    def recording_clip(parameters, limit):
        norms.append(float(clip(parameters, limit)))
        return torch.tensor(norms[-1])

    def recording_update(self, *args):
        found = {name: parameter.grad for name, parameter in adapter.named_parameters() if parameter.grad is not None}
        assert set(found) == trained[adapter.phase]
        expected.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in found.values())))
        update(self, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
    monkeypatch.setattr(PhaseOptimizer, "update", recording_update)
    dataset, labels = striped_data()
    train(adapter, dataset, labels, replace(SHORT, clip_norm=0.5), progress=False)
    assert norms == pytest.approx(expected)
    assert len(norms) == 16


def test_unreadable_images_are_left_out_of_evaluations_and_listed(tmp_path, capsys):
    folder_with_a_broken_image(tmp_path / "images")
    for number in range(20, 23):
        (tmp_path / "images" / "class 1" / f"{number}.png").write_bytes(b"")
    (tmp_path / "images" / "class 1" / "notes.txt").write_text("text")
    images = image_splits(tmp_path / "images")
    results = fit(tiny_adapter(), images, SHARED_ONLY, tmp_path / "run")
    assert [results[name].num_images for name in ("validation", "test")] == [27, 27]
    err = capsys.readouterr().err
    assert err.count("warning: train: 4 of 31 images cannot be read; other images of their classes replaced them") == 1
    for name in ("validation", "test"):
        assert err.count(f"warning: {name}: 4 of 31 images cannot be read; they are left out of the counts: ") == 1
        assert err.count(f"{name.capitalize()}: 31 images of 3 classes;") == 1
    assert f"Files that were left out or cannot be read: {tmp_path / 'run' / 'left_out.json'}\n" in err
    listed = json.loads((tmp_path / "run" / "left_out.json").read_text())
    for name in ("train", "validation", "test"):
        unreadable = listed[name]["unreadable"]
        assert unreadable["count"] == 4
        assert [Path(file).name for file in unreadable["files"]] == ["20.png", "21.png", "22.png", "23.png"]
        assert listed[name]["left_out"] == [
            {"reason": "not an image ending (.txt)", "count": 1, "files": [str(Path("class 1", "notes.txt"))]}
        ]
