"""The code of docs/how-to/export.md, in a process without lpt_peft, torch and timm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.data.transforms import transforms
from lpt_peft.inference import export_model
from tests.inference.digit_models import NAMES, digit_adapter, digits

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text("utf-8")
PREPARE, USE, *_ = re.findall(r"^```py(?:thon)?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BLOCK = 'import sys\nsys.modules.update(dict.fromkeys(["lpt_peft", "torch", "torchvision", "timm"]))\n'


def write_digits(folder):
    """Two digits as photos: a wide and a tall image, the second to be rotated."""
    images, _ = digits(count=2)
    for name, image, size in zip(["a.jpg", "b.jpg"], images, [(90, 61), (40, 53)], strict=True):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        photo = Image.fromarray(pixels).resize(size)
        exif = photo.getexif()
        exif[0x0112] = 6 if name == "b.jpg" else 1
        photo.save(folder / name, quality=95, exif=exif)


def test_the_page_names_the_classes_of_the_model(tmp_path):
    pytest.importorskip("onnxruntime")
    model = digit_adapter("group")
    export_model(model, tmp_path / "export", preprocess={"crop_pct": 0.9})
    write_digits(tmp_path / "export")
    words = [sys.executable, "-X", "utf8", "-c", BLOCK + PREPARE + USE]
    done = subprocess.run(words, capture_output=True, cwd=tmp_path / "export", check=False)
    assert done.returncode == 0, done.stderr
    transform = transforms({**model.preprocess(), "crop_pct": 0.9}, train=False)
    tensors = [transform(Image.open(tmp_path / "export" / name)) for name in ("a.jpg", "b.jpg")]
    with torch.no_grad():
        rows = (model(torch.stack(tensors)) / model.metadata.temperature).softmax(1)
    expected = [(NAMES[int(row.argmax())], float(row.max())) for row in rows]
    found = [line.split() for line in done.stdout.decode().splitlines()]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, percent), (_, probability) in zip(found, expected, strict=True):
        assert float(percent.rstrip("%")) == pytest.approx(100 * probability, abs=0.11)


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
