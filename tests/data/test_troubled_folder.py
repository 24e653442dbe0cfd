"""300 photos with more than 20 kinds of trouble: counts, pixels, and a list of every file that was left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lpt_peft import DualSampler
from lpt_peft.data import check_images, image_folder, transforms

COUNTS = {"ant": 140, "bee": 80, "caf\N{LATIN SMALL LETTER E WITH ACUTE}": 45, "dog & cat": 25, "eel": 10}
PREPROCESS = {
    "input_size": [3, 32, 32],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def photo(seed: int) -> Image.Image:
    """A smooth image, which JPEG changes little."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return coarse.resize((40, 36), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """The folder, and the files that must be left out, must be unreadable, and must be read although they look odd."""
    root = tmp_path_factory.mktemp("photos") / "data"
    seed = 0
    for name, count in COUNTS.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            photo(seed).save(root / name / f"{index:03}.jpg")
            seed += 1
    bee = root / "bee"
    left_out = []

    def junk(path: Path, content: bytes = b"x") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for name in ("ant/._000.jpg", "ant/Thumbs.db", ".DS_Store", "bee/notes.txt", "bee/clip.mp4", "bee/IMG_1.HEIC"):
        junk(root / name)
        left_out.append(name)
    for name in ("ant/.ipynb_checkpoints", "__MACOSX", ".git", "eel/@eaDir"):
        junk(root / name / "deep" / "000.jpg")
        left_out.append(name)
    junk(root / "labels.csv")
    photo(900).save(root / "stray.jpg")
    left_out += ["labels.csv", "stray.jpg"]
    (root / "eel" / "again").symlink_to(root)
    (root / "eel" / "same.jpg").symlink_to(bee / "000.jpg")
    (root / "eel" / "gone.jpg").symlink_to("nowhere.jpg")
    left_out += ["eel/again", "eel/same.jpg", "eel/gone.jpg"]

    unreadable = []
    (bee / "empty.jpg").touch()
    (bee / "page.jpg").write_text("<html>not found")
    (bee / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    photo(901).save(bee / "cut.png")
    (bee / "cut.png").write_bytes((bee / "cut.png").read_bytes()[:900])
    Image.fromarray(np.random.default_rng(902).random((36, 40), np.float32)).save(bee / "float.tif")
    unreadable += ["empty.jpg", "page.jpg", "pointer.jpg", "cut.png", "float.tif"]

    exif = Image.Exif()
    exif[0x0112] = 6
    photo(903).save(bee / "turned.jpg", exif=exif)
    photo(904).convert("CMYK").save(bee / "ink.jpg")
    clear = photo(905)
    clear.putalpha(0)
    clear.save(bee / "clear.png")
    Image.fromarray(np.asarray(photo(906).convert("L")).astype(np.uint16) << 8).save(bee / "deep.png")
    photo(907).save(bee / "old.gif")
    photo(908).save(bee / "new.avif")
    photo(909).save(bee / "phone.jfif")
    photo(910).save(root.parent / "outside.png")
    (bee / "outside.png").symlink_to(root.parent / "outside.png")
    odd = ["turned.jpg", "ink.jpg", "clear.png", "deep.png", "old.gif", "new.avif", "phone.jfif", "outside.png"]
    return root, sorted(set(left_out)), sorted(unreadable), odd


def test_counts_summary_and_every_file_left_out(troubled):
    root, left_out, unreadable, odd = troubled
    data = image_folder(root, unreadable="skip", transform=transforms(PREPROCESS, train=True))
    expected = dict(COUNTS)
    expected["bee"] += len(unreadable) + len(odd)
    assert dict(zip(data.class_names, data.class_counts, strict=True)) == expected
    listed = sorted(name for files in data.summary.left_out.values() for name in files)
    assert listed == left_out
    loader = DataLoader(data, batch_sampler=DualSampler(data.labels, batch_size=20), num_workers=2)
    for images, labels in loader:
        assert images.shape[1:] == (3, 32, 32)
        assert len(images) == len(labels)
    skipped = sorted(Path(name).name for name in data.skipped)
    assert skipped == unreadable
    assert f"{len(unreadable)} of {len(data)} images cannot be read" in data.skipped_report()
    text = str(data.summary)
    for phrase in ("313 images of 5 classes", "largest class ant (140)", "smallest class eel (10)", "5 cannot be read"):
        assert phrase in text, phrase


def test_odd_images_have_the_right_pixels(troubled):
    root, _, _, _ = troubled
    data = image_folder(root, unreadable="skip")
    images = {Path(data.images.name(index)).name: index for index, label in enumerate(data.labels) if label == 1}
    turned = np.asarray(data[images["turned.jpg"]][0]).astype(int)
    assert turned.shape == (40, 36, 3)
    assert np.abs(turned - np.rot90(np.asarray(photo(903)).astype(int), -1)).mean() < 8
    assert np.abs(turned - np.rot90(np.asarray(photo(903)).astype(int), 1)).mean() > 30
    assert (np.asarray(data[images["clear.png"]][0]) == 255).all()
    assert np.array_equal(np.asarray(data[images["deep.png"]][0])[..., 0], np.asarray(photo(906).convert("L")))
    ink = np.asarray(data[images["ink.jpg"]][0]).astype(int)
    assert np.abs(ink - np.asarray(photo(904)).astype(int)).mean() < 8


def test_the_check_finds_the_same(troubled):
    root, _, unreadable, _ = troubled
    report = check_images(image_folder(root))
    counts = report.counts
    assert sum(counts.get(kind, 0) for kind in ("not an image", "truncated", "unsupported mode")) == len(unreadable)
    assert (counts["rotated"], counts["transparent"], counts["mode"], counts["deep"]) == (1, 1, 1, 1)
    assert "duplicate" not in counts
