"""The code of docs/how-to/export.md, as printed, in processes without lpt_peft."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.data.transforms import transforms
from lpt_peft.inference import export_model
from tests.inference.digit_models import NAMES, digit_adapter, digits

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text("utf-8")
PREPARE, ONNX, PT2, AOTI, TASKS = re.findall(r"^```py(?:thon)?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
WITHOUT = 'import sys\nsys.modules.update(dict.fromkeys(["lpt_peft", "timm"]))\n'
WITHOUT_TORCH = WITHOUT + 'sys.modules.update(dict.fromkeys(["torch", "torchvision"]))\n'
IMAGES = "import json\npreprocess = json.load(open('model.json', encoding='utf-8'))['preprocess']\n"
IMAGES += "images = np.concatenate([prepare(file, preprocess) for file in ['a.jpg', 'b.jpg']])\n"


def write_digits(folder):
    """Two digits as photos: a wide and a tall image, the second to be rotated."""
    images, _ = digits(count=2)
    for name, image, size in zip(["a.jpg", "b.jpg"], images, [(90, 61), (40, 53)], strict=True):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        photo = Image.fromarray(pixels).resize(size)
        exif = photo.getexif()
        exif[0x0112] = 6 if name == "b.jpg" else 1
        photo.save(folder / name, quality=95, exif=exif)


def model_of_page(**options):
    """An adapter in phase "group" whose images are cropped."""
    model = digit_adapter("group", **options)
    model.metadata = replace(model.metadata, preprocess={"crop_pct": 0.9})
    return model


@torch.no_grad()
def expected_of(model, folder):
    """Class and probability of both photos."""
    transform = transforms(model.preprocess(), train=False)
    images = torch.stack([transform(Image.open(folder / name)) for name in ("a.jpg", "b.jpg")])
    rows = (model(images) / model.metadata.temperature).softmax(1)
    return [(NAMES[int(row.argmax())], float(row.max())) for row in rows]


def output_of(code, folder):
    """Run code in a folder, in a new process; its output."""
    words = [sys.executable, "-I", "-X", "utf8", "-c", code]
    done = subprocess.run(words, capture_output=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, other = model_of_page(), model_of_page(seed=1, classes=5)
    export_model(model, tmp_path / "export")
    write_digits(tmp_path / "export")
    other.save_pretrained(tmp_path / "even")
    export_model(model, tmp_path / "export" / "bank", task="digits", tasks={"even": tmp_path / "even"})
    first, second, *tasks = output_of(WITHOUT_TORCH + PREPARE + ONNX + TASKS, tmp_path / "export").splitlines()
    for line, (name, probability) in zip((first, second), expected_of(model, tmp_path / "export"), strict=True):
        found, percent = line.split()
        assert found == name
        assert float(percent.rstrip("%")) == pytest.approx(100 * probability, abs=0.11)
    for line, name, task in zip(tasks, ("digits", "even"), (model, other), strict=True):
        assert line == f"{name} {[found for found, _ in expected_of(task, tmp_path / 'export')]}"


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "code"), [("pt2", PT2), ("aoti", AOTI)])
def test_torch(kind, code, tmp_path):
    model = model_of_page()
    export_model(model, tmp_path / "export", format=kind)
    write_digits(tmp_path / "export")
    found = output_of(WITHOUT + PREPARE + IMAGES + code, tmp_path / "export")
    assert found == f"{[name for name, _ in expected_of(model, tmp_path / 'export')]}\n"


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_page_prepares_images_as_the_library_does(tmp_path, crop_pct, interpolation):
    write_digits(tmp_path)
    preprocess = {**digit_adapter("shared").preprocess(), "crop_pct": crop_pct, "interpolation": interpolation}
    page = {"__name__": "page"}
    exec(PREPARE, page)
    for name in ("a.jpg", "b.jpg"):
        found = page["prepare"](tmp_path / name, preprocess)
        expected = transforms(preprocess, train=False)(Image.open(tmp_path / name))
        np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)
