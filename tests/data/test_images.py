"""LabelledImages: labels and classes that fit, and images that cannot be read, found before or met at read time."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from lpt_peft import DualSampler, ShotMetrics
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.sources import ArrayImages, Chosen, ImageFiles, PathList, as_rgb
from lpt_peft.errors import ConfigError, InputError
from tests.data.make import color, seen, write_png

quick = settings(max_examples=60, deadline=None)


class Fake:
    """A source of numbers; what is in `broken` cannot be read."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, set(broken)

    def __len__(self):
        return self.size

    def read(self, index):
        if index in self.broken:
            raise SyntaxError("broken PNG file")  # what PIL raises on a bad chunk, no OSError
        return index

    def name(self, index):
        return f"fake-{index}"

    def present(self, index):
        return index not in self.broken


@pytest.fixture
def files(tmp_path):
    """Six files of two classes; 1 is missing, 4 is truncated, 5 is text."""
    paths = PathList()
    for index in range(6):
        path = tmp_path / f"{index}.png"
        write_png(path, index, index // 3, (40, 40))
        paths.append(path.name)
    (tmp_path / "1.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "4.png")
    data = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "5.png").write_text("<html>404</html>")
    return ImageFiles(tmp_path, paths)


LABELS = [0, 0, 0, 1, 1, 1]


def test_images_labels_names_and_counts(tmp_path):
    paths = PathList()
    for index, label in enumerate([1, 0, 1]):
        write_png(tmp_path / f"{index}.png", index, label)
        paths.append(f"{index}.png")
    data = LabelledImages(ImageFiles(tmp_path, paths), [1, 0, 1], ["cat", "dog"])
    assert (data.labels, data.class_names, data.class_counts, len(data)) == ([1, 0, 1], ["cat", "dog"], [1, 2], 3)
    assert [(seen(image), label) for image, label in data] == [(color(0, 1), 1), (color(1), 0), (color(2, 1), 1)]
    assert seen(data[-1][0]) == color(2, 1)
    with pytest.raises(IndexError):
        data[3]
    data.transform = lambda image: image.size
    assert data[0] == ((6, 5), 1)


def test_every_mode_is_read_as_rgb(tmp_path):
    paths = PathList()
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.tif")
        paths.append(f"{mode}.tif")
    assert {image.mode for image, _ in LabelledImages(ImageFiles(tmp_path, paths), [0, 0, 1, 1, 1])} == {"RGB"}


def test_16_bits_of_grey_are_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert Image.open(tmp_path / "ramp.png").mode == "I;16"
    pixels = np.asarray(as_rgb(Image.open(tmp_path / "ramp.png")))
    assert np.array_equal(pixels[..., 1].ravel(), np.arange(256))


def test_samplers_and_metrics_take_its_labels_and_counts():
    data = LabelledImages(Fake(30), [0] * 20 + [1] * 8 + [2] * 2)
    assert all(type(value) is int for value in data.labels + data.class_counts)
    loader = DataLoader(data, batch_sampler=DualSampler(data.labels, batch_size=12))
    for images, labels in loader:
        assert labels.tolist() == [data.labels[index] for index in images.tolist()]
        assert Counter(labels[6:].tolist()) == {0: 2, 1: 2, 2: 2}
    metrics = ShotMetrics(data.class_counts, many=15, few=5)
    metrics.update(data.labels, data.labels)
    assert (metrics.compute().many, metrics.compute().few) == (1.0, 1.0)


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_labels_are_taken_exactly_if_no_class_is_empty(labels):
    size = max(labels) + 1
    fine = size > 1 and set(labels) == set(range(size))
    try:
        data = LabelledImages(Fake(len(labels)), labels)
    except InputError:
        assert not fine
    else:
        assert fine
        assert data.class_counts == [labels.count(label) for label in range(size)]
    part = LabelledImages(Fake(len(labels)), labels, list("abcdefg"), allow_empty=True)
    assert part.class_counts == [labels.count(label) for label in range(7)]


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([], None, "labels are empty"),
        ([0, -1, 1], None, r"labels\[1\] is -1"),
        ([0, 1, 3, 3], None, "1 of 4 classes have no image; the first is label 2. Number"),
        ([1, 2, 1], None, "1 of 3 classes have no image; the first is label 0"),
        ([0, 1, 10**15], None, "the first is label 2"),  # and no array of 10^15 counters
        ([0, 1, 1], ["a", "b", "c"], r"the first is label 2 \('c'\)"),
        ([0, 0, 0], None, "All 3 images are of one class"),
        ([0, 1], ["a", "caf\udce9"], r"class name 'caf\\udce9' holds what cannot be printed"),
        ([0, 1], ["a", "b\nc"], r"class name 'b\\nc' holds"),
        ([0, 0], ["only"], "All 2 images are of one class"),
        ([0, 1, 2], ["a", "b"], r"labels\[2\] is 2, but there are 2 class names"),
        ([0.0, 1.0], None, "integers, not float64"),
        ([[0, 1], [1, 0]], None, "one-dimensional"),
        (["cat", "dog"], None, "integers, not <U3"),
    ],
)
def test_bad_labels(labels, names, words):
    with pytest.raises(InputError, match=words):
        LabelledImages(Fake(len(labels)), labels, names)


def test_bad_settings():
    with pytest.raises(InputError, match="3 labels do not fit 2 images"):
        LabelledImages(Fake(2), [0, 1, 1])
    with pytest.raises(ConfigError, match="unreadable='ignore'"):
        LabelledImages(Fake(2), [0, 1], unreadable="ignore")
    with pytest.raises(ConfigError, match="verify=True"):
        LabelledImages(Fake(2), [0, 1], verify=True)
    with pytest.raises(ConfigError, match="allow_empty=True needs class_names"):
        LabelledImages(Fake(2), [0, 1], allow_empty=True)
    with pytest.raises(InputError, match="is no folder"):
        ImageFiles("/nowhere", PathList())


@pytest.mark.parametrize(("index", "cause"), [(1, "FileNotFoundError"), (4, "OSError"), (5, "UnidentifiedImageError")])
def test_error_names_path_and_index(files, index, cause):
    data = LabelledImages(files, LABELS)
    assert seen(data[0][0]) == color(0)
    with pytest.raises(InputError, match=rf"{index}\.png \(index {index}\) cannot be read: {cause}") as caught:
        data[index]
    assert 'unreadable="skip"' in str(caught.value)
    assert data.skipped == []


def test_skip_takes_the_next_of_the_class_and_counts(files):
    data = LabelledImages(files, LABELS, unreadable="skip")
    with pytest.warns(UserWarning, match=r"1\.png \(index 1\) cannot be read"):
        image, _ = data[1]
    assert seen(image) == color(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert (seen(data[4][0]), data[4][1]) == (color(3, 1), 1)
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]
    assert data.class_counts == [3, 3]


@quick
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stand_ins_are_those_of_the_description(draw):
    labels = draw.draw(st.lists(st.integers(0, 3), min_size=2, max_size=20).filter(lambda rows: len(set(rows)) > 1))
    labels = [sorted(set(labels)).index(label) for label in labels]
    size = len(labels)
    broken = draw.draw(st.sets(st.integers(0, size - 1)))
    data = LabelledImages(Fake(size, broken), labels, unreadable="skip")
    for index in draw.draw(st.permutations(range(size))):
        wanted = [row for row in [*range(index, size), *range(index)] if labels[row] == labels[index]]
        wanted = [row for row in wanted if row not in broken]
        if wanted:
            assert data[index] == (wanted[0], labels[index])
        else:
            with pytest.raises(InputError, match="has no image that can be read"):
                data[index]
    assert data.skipped == [f"fake-{index}" for index in sorted(broken)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_workers_skip_is_known_here(files, start):
    data = LabelledImages(files, LABELS, transform=pil_to_tensor, unreadable="skip")
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    found = torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist()
    assert found == [0, 2, 2, 3, 3, 3]
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]


def test_error_of_a_worker_is_the_same_error(files):
    loader = DataLoader(LabelledImages(files, LABELS, transform=pil_to_tensor), num_workers=1)
    with pytest.raises(InputError, match=r"1\.png \(index 1\) cannot be read"):
        list(loader)


def test_verify_finds_before_reading(files):
    with pytest.raises(InputError, match=r"1 of 6 images are missing: .*1\.png\. Mend"):
        LabelledImages(files, LABELS, verify="exists")
    with pytest.raises(InputError, match=r"3 of 6 images cannot be read: .*1\.png, .*4\.png, .*5\.png\."):
        LabelledImages(files, LABELS, verify="decode")
    with pytest.warns(UserWarning, match="3 of 6 images cannot be read"):
        data = LabelledImages(files, LABELS, unreadable="skip", verify="decode")
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]
    assert seen(data[5][0]) == color(3, 1)
    with pytest.raises(InputError, match=r"fake-4, \.\.\."):
        LabelledImages(Fake(9, range(9)), [0, 1, 1, 1, 1, 1, 1, 1, 1], verify="exists")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LabelledImages(Fake(2), [0, 1], verify="decode", unreadable="skip")


def test_want_of_memory_is_not_the_images_fault():
    class Hungry(Fake):
        def read(self, index):
            raise MemoryError

    with pytest.raises(MemoryError):
        LabelledImages(Hungry(2), [0, 1], unreadable="skip")[0]


def test_an_error_of_the_transform_is_the_callers():
    data = LabelledImages(Fake(2), [0, 1], transform=lambda image: 1 / image, unreadable="skip")
    with pytest.raises(ZeroDivisionError):
        data[0]
    assert data.skipped == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_subset_keeps_names_policy_and_what_was_found():
    data = LabelledImages(Fake(6, {4}), LABELS, ["a", "b"], transform=str, unreadable="skip", verify="decode")
    part = data.subset([5, 0, 4])
    assert (part.labels, part.class_names, part.class_counts) == ([1, 0, 1], ["a", "b"], [1, 2])
    assert [part[index] for index in range(3)] == [("5", 1), ("0", 0), ("5", 1)]
    assert part.skipped == ["fake-4"]
    again = part.subset([2, 1])
    assert again.skipped == ["fake-4"]
    assert again[1] == ("0", 0)
    with pytest.raises(InputError, match=r"label 1 \('b'\)"):
        data.subset([0, 1])
    assert data.subset([0, 1], allow_empty=True).class_counts == [2, 0]
    for index in (6, -1):
        with pytest.raises(InputError, match=f"index={index} must be an integer from 0 to 5"):
            data.subset([0, index])


def test_sources_name_what_they_read():
    array = ArrayImages(np.zeros((3, 2, 2, 3), np.uint8), "zeros")
    assert (array.name(2), array.present(2)) == ("image 2 of zeros", True)
    chosen = Chosen(Fake(5, {3}), [3, 1])
    assert (chosen.name(0), chosen.present(0), chosen.present(1), chosen.read(1)) == ("fake-3", False, True, 1)


@quick
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=9)))
def test_paths_come_back_as_they_went_in(texts):
    paths = PathList()
    for text in texts:
        paths.append(text)
    assert list(paths) == texts
    assert list(pickle.loads(pickle.dumps(paths))) == texts
    raw = PathList()
    raw.append(b"caf\xe9.jpg")  # no UTF-8; the file system takes it
    assert raw[0].encode("utf-8", "surrogateescape") == b"caf\xe9.jpg"
