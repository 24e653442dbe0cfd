"""check_images: every kind of trouble is planted once and found, and nothing else is reported."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.image_list import image_list
from lpt_peft.data.inspection import check_images as module
from lpt_peft.data.inspection.check_images import check_images
from lpt_peft.data.inspection.report import KINDS, UNREADABLE, CheckReport, Finding
from tests.data.files.test_reading import png


def photo(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kinds(report: CheckReport) -> dict[str, list[str]]:
    """File names without folders, for each kind."""
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).append(" ".join(name.rsplit("/", 1)[-1] for name in finding.files))
    return found


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """Two classes of good photos, and a file for every kind of finding."""
    folder = tmp_path / "a"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo(ord(name)).save(tmp_path / name / "good.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(1).save(folder / "rotated.jpg", exif=exif)
    photo(2).save(folder / "rotated.tif", exif=exif)
    photo(3).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    photo(4).save(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-700])
    photo(5).save(folder / "flipped.png")
    data = bytearray((folder / "flipped.png").read_bytes())
    data[60:70] = b"xxxxxxxxxx"
    (folder / "flipped.png").write_bytes(data)
    (folder / "page.jpg").write_text("<html>")
    (folder / "empty.gif").touch()
    Image.fromarray(np.random.rand(40, 40).astype(np.float32)).save(folder / "float.tif")
    photo(6).convert("CMYK").save(folder / "cmyk.tif")
    deep = np.arange(1600).reshape(40, 40)
    Image.fromarray(deep.astype(np.uint16)).save(folder / "deep.png")
    (folder / "deepcolour.png").write_bytes(png(np.random.default_rng(7).integers(0, 65536, (40, 40, 3)), 16, 2))
    clear = photo(8)
    clear.putalpha(100)
    clear.save(folder / "clear.webp", lossless=True)
    photo(9).save(folder / "moving.gif", save_all=True, append_images=[photo(10)])
    photo(11, 4, 60).save(folder / "tiny.png")
    Image.new("RGB", (40, 40), (7, 7, 7)).save(folder / "blank.png")
    photo(12).save(folder / "twin1.png")
    photo(12).save(folder / "twin2.bmp")
    photo(13).save(folder / "both.png")
    photo(13).save(tmp_path / "b" / "both2.png")
    (folder / "notes.txt").write_text("left out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    photo(14, 120, 100).save(folder / "large.bmp")
    photo(15, 200, 200).save(folder / "huge.bmp")
    return tmp_path


EXPECTED = {
    "not an image": ["empty.gif", "page.jpg"],
    "truncated": ["cut.jpg", "cut.png"],
    "corrupt": ["flipped.png"],
    "unsupported mode": ["float.tif"],
    "too large": ["huge.bmp"],
    "duplicate in several classes": ["both.png both2.png"],
    "duplicate": ["twin1.png twin2.bmp"],
    "rotated": ["rotated.jpg", "rotated.tif"],
    "transparent": ["clear.webp"],
    "mode": ["cmyk.tif"],
    "deep": ["deep.png", "deepcolour.png"],
    "animated": ["moving.gif"],
    "blank": ["blank.png"],
    "tiny": ["tiny.png"],
    "enormous": ["large.bmp"],
}


def test_every_kind_is_found_once(troubled, recwarn):
    report = check_images(image_folder(troubled))
    assert kinds(report) == EXPECTED
    assert not report.readable
    assert not recwarn.list
    assert list(report.counts) == [kind for kind in KINDS if kind in EXPECTED]
    details = {finding.files[0].rsplit("/", 1)[-1]: finding.detail for finding in report.findings}
    assert details["rotated.jpg"] == details["rotated.tif"] == "EXIF orientation 6"
    assert details["deep.png"] == "grey, mode I;16, values from 0 to 1599"
    assert details["tiny.png"] == "60 x 4 pixels"
    assert details["moving.gif"] == "2 frames"
    assert details["both.png"] == "classes a, b"
    assert "the file is empty" in details["empty.gif"]
    text = str(report)
    assert "2 truncated: the end of the file is missing" in text
    assert text.count("left out") == 1, "listed once, with all files"
    assert "1 left out: not an image ending (.txt)\n  a/notes.txt" in text
    assert f"  {troubled / 'a' / 'both.png'} = {troubled / 'b' / 'both2.png'} (classes a, b)" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["counts"] == report.counts
    assert len(plain["findings"]) == len(report.findings)
    assert plain["readable"] is False


def test_what_the_check_finds_is_what_training_cannot_read(troubled):
    data = image_folder(troubled)
    broken = {finding.files[0] for finding in check_images(data).findings if finding.kind in UNREADABLE}
    skipping = image_folder(troubled, unreadable="skip", verify="decode")
    assert broken == set(skipping.skipped)


def test_splits_are_compared(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            photo(ord(name) + (split == "val") * 10).save(tmp_path / split / name / "1.png")
    photo(1).save(tmp_path / "train" / "a" / "leak.png")
    photo(1).save(tmp_path / "val" / "b" / "leak.bmp")
    splits = {name: image_folder(tmp_path / name) for name in ("train", "val")}
    steps = []
    report = check_images(splits, progress=lambda done, total: steps.append((done, total)))
    [finding] = report.findings
    assert finding.kind == "duplicate in several splits"
    assert finding.detail == "classes a, b"
    assert [name.split(": ")[0] for name in finding.files] == ["train", "val"]
    assert steps == [(done, 6) for done in range(1, 7)]
    assert report.readable
    assert "val: 3 images of 2 classes" in str(report)


def test_sources_that_are_not_files(monkeypatch):
    images = torch.rand(3, 3, 20, 20)
    images[2] = 0
    threads = []
    executor = module.ThreadPoolExecutor
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda workers: threads.append(workers) or executor(workers))
    report = check_images(from_dataset(TensorDataset(images), [0, 1, 1]))
    assert kinds(report) == {"blank": ["image 2 of TensorDataset"]}
    assert threads == [1], "a data set of unknown kind is read by a single thread"
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    photo(1).save(stream, "PNG", exif=exif)
    report = check_images(from_dataset([(stream.getvalue(),), (photo(2),)], [0, 1]))
    assert kinds(report) == {"rotated": ["image 0 of list"]}


def test_missing_files(tmp_path):
    photo(1).save(tmp_path / "1.png")
    (tmp_path / "list.txt").write_text("1.png 0\n2.png 1\n")
    report = check_images(image_list(tmp_path / "list.txt", tmp_path), workers=3)
    assert kinds(report) == {"missing": ["2.png"]}


def test_order_does_not_depend_on_threads(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(80):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    data = image_folder(tmp_path)
    reports = [check_images(data, workers=workers) for workers in (1, 8)]
    assert reports[0].findings == reports[1].findings
    assert reports[0].counts == {"duplicate in several classes": 80, "blank": 160}


def test_interrupts_stop_the_check(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(100):
            photo(index).save(tmp_path / name / f"{index}.png")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_images(image_folder(tmp_path), workers=2, progress=interrupt)


def corrupt(path, seed):
    photo(seed).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[60:70] = b"xxxxxxxxxx"
    path.write_bytes(content)


def truncated(path, seed):
    photo(seed).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:1000])


def rotated(path, seed):
    exif = Image.Exif()
    exif[0x0112] = 2 + seed % 7
    photo(seed).save(path, "JPEG", exif=exif)


MAKERS = {
    None: [
        lambda path, seed: photo(seed).save(path, "JPEG"),
        lambda path, seed: photo(seed).convert("L").save(path, "PNG"),
        lambda path, seed: photo(seed).quantize(16).save(path, "GIF"),
        lambda path, seed: photo(seed).save(path, "WEBP"),
    ],
    "rotated": [rotated],
    "corrupt": [corrupt],
    "truncated": [truncated],
    "not an image": [lambda path, seed: path.write_bytes(b"x" * seed)],
    "unsupported mode": [
        lambda path, seed: Image.fromarray(np.random.default_rng(seed).random((20, 20), np.float32)).save(path, "TIFF"),
        lambda path, seed: Image.fromarray(np.full((20, 20), seed, np.int32)).save(path, "TIFF"),
    ],
    "mode": [lambda path, seed: photo(seed).convert("CMYK").save(path, "TIFF")],
    "deep": [
        lambda path, seed: Image.fromarray(
            np.random.default_rng(seed).integers(0, 65536, (20, 20)).astype(np.uint16)
        ).save(path, "PNG")
    ],
    "transparent": [
        lambda path, seed: photo(seed).convert("RGBA").save(path, "PNG"),
        lambda path, seed: photo(seed).convert("LA").save(path, "PNG"),
    ],
    "tiny": [lambda path, seed: photo(seed, 7, 30).save(path, "BMP")],
}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_folders_of_odd_images(draw):
    """Every file has the ending .png; what it contains decides what is found, and what training can read."""
    planted = draw.draw(st.lists(st.tuples(st.sampled_from(list(MAKERS)), st.integers(0, 3)), max_size=12))
    with tempfile.TemporaryDirectory() as folder:
        classes = {}
        for label, name in enumerate(["a", "\N{LATIN SMALL LETTER E WITH ACUTE}"]):
            Path(folder, name).mkdir()
            photo(label).save(Path(folder, name, "good.png"))
            classes[name] = 1
        expected = Counter()
        for index, (kind, choice) in enumerate(planted):
            name = list(classes)[index % 2]
            maker = MAKERS[kind][choice % len(MAKERS[kind])]
            maker(Path(folder, name, f"{index}.png"), 100 + index)
            classes[name] += 1
            expected[kind] += 1
        del expected[None]
        data = image_folder(folder, unreadable="skip")
        assert data.class_counts == list(classes.values())
        report = check_images(data, workers=1)
        assert report.counts == dict(expected)
        assert all(image.mode == "RGB" for image, _ in data)
        broken = sorted(finding.files[0] for finding in report.findings if finding.kind in UNREADABLE)
        assert sorted(data.skipped) == broken


def test_findings_are_printable():
    assert str(Finding("corrupt", ("a\x1b[1m",), "b\n")).isprintable()
