"""LabelledImages: validation of labels and classes, and images that cannot be read."""

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
from lpt_peft.data._unreadable import ClassOrder
from lpt_peft.data.files.path_list import PathList
from lpt_peft.data.files.reading import open_image, read_image
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.inspection.check_images import check_images
from lpt_peft.data.sources import ArrayImages, ImageFiles, SubsetSource
from lpt_peft.errors import ConfigError, InputError
from tests.data.make import color, seen, write_png

quick = settings(max_examples=60, deadline=None)


class Fake:
    """A source of numbers; those in `broken` cannot be read."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, set(broken)

    def __len__(self):
        return self.size

    def read(self, index):
        if index in self.broken:
            raise SyntaxError("broken PNG file")  # raised by PIL on a bad chunk
        return index

    def name(self, index):
        return f"fake-{index}"

    def path(self, index):
        return "/missing" if index in self.broken else None


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


def test_samplers_and_metrics_take_labels_and_counts():
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
def test_labels_are_accepted_exactly_if_every_class_has_an_image(labels):
    size = max(labels) + 1
    valid = size > 1 and set(labels) == set(range(size))
    try:
        data = LabelledImages(Fake(len(labels)), labels)
    except InputError:
        assert not valid
    else:
        assert valid
        assert data.class_counts == [labels.count(label) for label in range(size)]
    split = LabelledImages(Fake(len(labels)), labels, list("abcdefg"), allow_empty=True)
    assert split.class_counts == [labels.count(label) for label in range(7)]


@pytest.mark.parametrize(
    "names",
    [{0: "cat", 1: "dog"}, {1: "dog", 0: "cat"}, {"1": "dog", "0": "cat"}, {"dog": 1, "cat": 0}, ("cat", "dog")],
)
def test_class_names_are_ordered_by_label(names):
    assert LabelledImages(Fake(3), [0, 1, 1], names).class_names == ["cat", "dog"]
    assert LabelledImages(Fake(1), [1], names, allow_empty=True).class_counts == [0, 1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "cat"], "'cat' for the classes 0 and 1"),
        (["caf\u00e9", "cafe\u0301"], "up to Unicode normalization"),
        ({"cat", "dog"}, "is a set"),
        ("ab", "must be one string per class"),
        ({1: "cat", 2: "dog"}, "labels must be 0 to 1"),
        (["cat", ""], "A class name is empty"),
        ([0, 1], "must be a string"),
    ],
)
def test_bad_class_names(names, words):
    with pytest.raises(InputError, match=words):
        LabelledImages(Fake(3), [0, 1, 1], names)


@pytest.mark.parametrize(
    "name",
    [
        "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627",
        "\u3000",
        "a\u00a0b",
        "\u0915\u094d\u200d\u0937",
        "\U0001f469\u200d\U0001f52c",
    ],
)
def test_names_with_joiners_and_unusual_spaces_are_accepted(name):
    assert LabelledImages(Fake(2), [0, 1], ["a", name]).class_names == ["a", name]


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([], None, "labels are empty"),
        ([0, -1, 1], None, r"labels\[1\] is -1"),
        ([0, 1, 3, 3], None, "1 of 4 classes have no image; the first is label 2. Number"),
        ([1, 2, 1], None, "Labels start at 1: subtract 1"),
        ([0, 1, 10**15], None, "the first is label 2"),  # without an array of 10^15 counts
        ([0, 1, 1], ["a", "b", "c"], r"the first is label 2 \('c'\)"),
        ([0, 0, 0], None, "All 3 images belong to the same class"),
        ([0, 1], ["a", "caf\udce9"], r"class name 'caf\\udce9' has bytes that are not UTF-8"),
        ([0, 1], ["a", "b\nc"], r"class name 'b\\nc' has the control character U\+000A, which"),
        ([0, 0], ["only"], "All 2 images belong to the same class"),
        ([0, 1, 2], ["a", "b"], r"labels\[2\] is 2, but there are 2 class names"),
        ([0.0, 1.0], None, "labels must be "),
        ([[0, 1], [1, 0]], None, "one-dimensional"),
        (["cat", "dog"], None, "labels must be "),
    ],
)
def test_bad_labels(labels, names, words):
    with pytest.raises(InputError, match=words):
        LabelledImages(Fake(len(labels)), labels, names)


def test_bad_settings():
    with pytest.raises(InputError, match="3 labels do not match 2 images"):
        LabelledImages(Fake(2), [0, 1, 1])
    with pytest.raises(ConfigError, match="unreadable='ignore'"):
        LabelledImages(Fake(2), [0, 1], unreadable="ignore")
    with pytest.raises(ConfigError, match="verify=True"):
        LabelledImages(Fake(2), [0, 1], verify=True)
    with pytest.raises(ConfigError, match="allow_empty=True needs class_names"):
        LabelledImages(Fake(2), [0, 1], allow_empty=True)
    with pytest.raises(InputError, match="is not a folder"):
        ImageFiles("/nowhere", PathList())


@pytest.mark.parametrize(("index", "cause"), [(1, "FileNotFoundError"), (4, "OSError"), (5, "UnidentifiedImageError")])
def test_error_names_path_and_index(files, index, cause):
    data = LabelledImages(files, LABELS)
    assert seen(data[0][0]) == color(0)
    with pytest.raises(InputError, match=rf"{index}\.png \(index {index}\) cannot be read: {cause}") as caught:
        data[index]
    assert 'unreadable="skip"' in str(caught.value)
    assert data.skipped == []


def test_skip_reads_the_next_image_of_the_class(files, caplog):
    data = LabelledImages(files, LABELS, unreadable="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, _ = data[1]
        assert seen(image) == color(2)
        assert (seen(data[4][0]), data[4][1]) == (color(3, 1), 1)
    [record] = caplog.records  # of three unreadable images the first is logged
    assert (record.name, record.levelname) == ("lpt_peft.data", "WARNING")
    assert "1.png (index 1) cannot be read: FileNotFoundError" in record.message
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]
    assert data.class_counts == [3, 3]
    report = data.skipped_report()
    assert "3 of 6 images cannot be read" in report
    assert all(f"{files.name(index)} ({cause}" in report for index, cause in ((1, "FileNotFound"), (5, "Unidentified")))


def test_skipped_images_are_not_logged_if_the_caller_reports_them(files, caplog):
    data = LabelledImages(files, LABELS, unreadable="skip")
    assert data.skipped_report() is None
    data.unreadable_images.announce = False
    assert seen(data[1][0]) == color(2)
    assert not caplog.records
    assert data.skipped == [files.name(1)]
    assert not data.subset(range(6)).unreadable_images.announce


def test_a_report_of_many_names_the_first():
    data = LabelledImages(Fake(9, range(8)), [0] * 8 + [1] + [0] * 0, unreadable="skip", allow_empty=False)
    with pytest.raises(InputError, match="Class 0 \\('0'\\) has no readable image, so fake-2 \\(index 2\\)"):
        data[2]
    assert data.skipped_report().startswith("8 of 9 images cannot be read")
    assert data.skipped_report().count("SyntaxError: broken PNG file") == 5
    assert data.skipped_report().endswith(", ...")


def test_a_replacement_is_found_without_a_scan_of_the_data_set():
    """Every access to a label is counted; a draw of a broken image may look at its own label only."""

    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            type(self).reads += 1
            return super().__getitem__(index)

    size = 100_000
    data = LabelledImages(Fake(size, {0}), [0] + [1] * (size - 2) + [0], unreadable="skip")
    data.labels = Counted(data.labels)
    assert data[0] == (size - 1, 0)
    Counted.reads = 0
    for _ in range(20):
        assert data[0] == (size - 1, 0)
    assert Counted.reads <= 60


def test_many_unreadable_images_in_a_row_are_passed_over_in_a_few_arrays(monkeypatch):
    """Draws before a long row of images that are known to be unreadable look at arrays, not at single images."""
    arrays = []

    def counted(order, position, label):
        for array in others(order, position, label):
            arrays.append(len(array))
            yield array

    others = ClassOrder.others
    monkeypatch.setattr(ClassOrder, "others", counted)
    size = 60_000
    data = LabelledImages(Fake(size, range(size - 2)), [0] * (size - 1) + [1], unreadable="skip")
    data.unreadable_images.add(range(size - 2))
    for position in range(0, size - 2, 600):
        arrays.clear()
        assert data[position] == (size - 2, 0)
        assert 1 <= len(arrays) <= 7  # 16, 64, ..., 65,536


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_warnings_of_pillow_are_not_repeated_in_every_epoch(tmp_path, monkeypatch, policy):
    write_png(tmp_path / "0.png", 0, size=(20, 20))
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01"  # ends in the middle of an entry
    Image.new("RGB", (20, 20)).save(tmp_path / "1.jpg", exif=exif)
    paths = PathList()
    paths.append("0.png")
    paths.append("1.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.warns(Image.DecompressionBombWarning):
        open_image(tmp_path / "0.png")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        open_image(tmp_path / "1.jpg").getexif()
    data = LabelledImages(ImageFiles(tmp_path, paths), [0, 1], unreadable=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [image.size for image, _ in data] == [(20, 20)] * 2
        read_image(tmp_path / "1.jpg")
    report = check_images(data)
    assert report.counts["enormous"] == 2


def test_a_class_with_many_unreadable_images_is_searched_once():
    class CountedSource(Fake):
        reads = 0

        def read(self, index):
            self.reads += 1
            return super().read(index)

    source = CountedSource(500, range(498))
    data = LabelledImages(source, [0] * 499 + [1], unreadable="skip")
    assert data[3] == (498, 0)
    source.reads = 0
    assert data[3] == (498, 0)
    assert source.reads == 2, "the image and its replacement"
    assert data[7] == (498, 0)
    assert source.reads == 4, "images that are known to be unreadable are not tried again"


@quick
@given(st.data())
def test_replacements_are_as_documented(draw):
    labels = draw.draw(st.lists(st.integers(0, 3), min_size=2, max_size=20).filter(lambda rows: len(set(rows)) > 1))
    labels = [sorted(set(labels)).index(label) for label in labels]
    size = len(labels)
    broken = draw.draw(st.sets(st.integers(0, size - 1)))
    data = LabelledImages(Fake(size, broken), labels, unreadable="skip")
    for index in draw.draw(st.permutations(range(size))):
        candidates = [row for row in [*range(index, size), *range(index)] if labels[row] == labels[index]]
        candidates = [row for row in candidates if row not in broken]
        if candidates:
            assert data[index] == (candidates[0], labels[index])
        else:
            with pytest.raises(InputError, match="has no readable image"):
                data[index]
    assert data.skipped == [f"fake-{index}" for index in sorted(broken)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_images_skipped_by_workers_are_known_to_the_main_process(files, start):
    data = LabelledImages(files, LABELS, transform=pil_to_tensor, unreadable="skip")
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    found = torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist()
    assert found == [0, 2, 2, 3, 3, 3]
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]


def test_error_of_a_worker_is_the_same_error(files):
    loader = DataLoader(LabelledImages(files, LABELS, transform=pil_to_tensor), num_workers=1)
    with pytest.raises(InputError, match=r"1\.png \(index 1\) cannot be read"):
        list(loader)


def test_verify_finds_unreadable_images_early(files, caplog):
    with pytest.raises(InputError, match=r"1 of 6 images are missing: .*1\.png\. Repair"):
        LabelledImages(files, LABELS, verify="exists")
    with pytest.raises(InputError, match=r"3 of 6 images cannot be read: .*1\.png, .*4\.png, .*5\.png\."):
        LabelledImages(files, LABELS, verify="decode")
    data = LabelledImages(files, LABELS, unreadable="skip", verify="decode")
    assert "3 of 6 images cannot be read" in caplog.text
    assert data.skipped == [files.name(index) for index in (1, 4, 5)]
    assert seen(data[5][0]) == color(3, 1)
    with pytest.raises(InputError, match=r"fake-4, \.\.\."):
        LabelledImages(Fake(9, range(9)), [0, 1, 1, 1, 1, 1, 1, 1, 1], verify="exists")
    caplog.clear()
    LabelledImages(Fake(2), [0, 1], verify="decode", unreadable="skip")
    assert not caplog.records


def test_memory_errors_are_not_blamed_on_the_image():
    class Hungry(Fake):
        def read(self, index):
            raise MemoryError

    with pytest.raises(MemoryError):
        LabelledImages(Hungry(2), [0, 1], unreadable="skip")[0]


def test_errors_of_the_transform_are_raised():
    data = LabelledImages(Fake(2), [0, 1], transform=lambda image: 1 / image, unreadable="skip")
    with pytest.raises(ZeroDivisionError):
        data[0]
    assert data.skipped == []


def test_subset_keeps_names_options_and_skipped_images():
    data = LabelledImages(Fake(6, {4}), LABELS, ["a", "b"], transform=str, unreadable="skip", verify="decode")
    subset = data.subset([5, 0, 4])
    assert (subset.labels, subset.class_names, subset.class_counts) == ([1, 0, 1], ["a", "b"], [1, 2])
    assert [subset[index] for index in range(3)] == [("5", 1), ("0", 0), ("5", 1)]
    assert subset.skipped == ["fake-4"]
    again = subset.subset([2, 1])
    assert again.skipped == ["fake-4"]
    assert again[1] == ("0", 0)
    with pytest.raises(InputError, match=r"label 1 \('b'\)"):
        data.subset([0, 1])
    assert data.subset([0, 1], allow_empty=True).class_counts == [2, 0]
    for index in (6, -1):
        with pytest.raises(InputError, match=f"index={index} must be .* from 0 to 5"):
            data.subset([0, index])


def test_sources_name_their_images():
    array = ArrayImages(np.zeros((3, 2, 2, 3), np.uint8), "zeros")
    assert (array.name(2), array.path(2)) == ("image 2 of zeros", None)
    subset = SubsetSource(Fake(5, {3}), [3, 1])
    assert (subset.name(0), subset.path(0), subset.path(1), subset.read(1)) == ("fake-3", "/missing", None, 1)


@quick
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=9)))
def test_path_list_returns_the_appended_paths(texts):
    paths = PathList()
    for text in texts:
        paths.append(text)
    assert list(paths) == texts
    assert list(pickle.loads(pickle.dumps(paths))) == texts
    raw = PathList()
    raw.append(b"caf\xe9.jpg")  # not UTF-8, but a valid file name
    assert raw[0].encode("utf-8", "surrogateescape") == b"caf\xe9.jpg"
