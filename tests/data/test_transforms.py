"""Transforms compared with Pillow: sizes, borders, mean and std; random draws from the generator of torch."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lpt_peft import LongTailPromptAdapter
from lpt_peft.data.transforms import RECIPE_CROP_PCT, transforms
from lpt_peft.errors import ConfigError
from tests.conftest import tiny_vit

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
CONFIG = {
    "input_size": [3, 224, 224],
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def photo(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_hand(image, size, box, resample=Image.Resampling.BICUBIC):
    """Resize to (width, height), crop the box, scale to 0..1, subtract MEAN, divide by STD."""
    pixels = np.asarray(image.resize(size, resample).crop(box), dtype=np.float64) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1)).float()


def test_evaluation_of_the_recipe_resizes_to_256_and_crops_224():
    image = photo(300, 400)
    tensor = transforms(CONFIG, train=False, crop_pct=RECIPE_CROP_PCT)(image)
    # 300 x 400 becomes 256 x 341; the central 224 start at 16 and round(58.5) = 58.
    torch.testing.assert_close(tensor, by_hand(image, (256, 341), (16, 58, 240, 282)), atol=1e-6, rtol=1e-6)


def test_evaluation_follows_the_configuration_of_the_backbone():
    image = photo(500, 300)
    tensor = transforms({**CONFIG, "interpolation": "bilinear"}, train=False)(image)
    # floor(224 / 0.9) = 248; 500 x 300 becomes 413 x 248; from round(94.5) = 94 and 12.
    expected = by_hand(image, (413, 248), (94, 12, 318, 236), Image.Resampling.BILINEAR)
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
    small = {**CONFIG, "input_size": [3, 32, 32]}
    uncropped = transforms(small, train=False, crop_pct=1)(photo(32, 32))
    torch.testing.assert_close(uncropped, by_hand(photo(32, 32), (32, 32), (0, 0, 32, 32)), atol=1e-6, rtol=1e-6)
    squashed = transforms({**small, "crop_mode": "squash", "crop_pct": 1.0}, train=False)(photo(64, 40))
    torch.testing.assert_close(squashed, by_hand(photo(64, 40), (32, 32), (0, 0, 32, 32)), atol=1e-6, rtol=1e-6)


def test_five_crops_are_centre_and_corners_of_a_larger_image():
    image = photo(300, 400)
    five = pickle.loads(pickle.dumps(transforms(CONFIG, train=False, crops=5)))(image)
    # 300 x 400 becomes 248 x 330, 24 pixels more than the crop; the centre starts at 12 and 53.
    boxes = [(12, 53), (0, 0), (24, 0), (0, 106), (24, 106)]
    expected = [by_hand(image, (248, 330), (left, top, left + 224, top + 224)) for left, top in boxes]
    torch.testing.assert_close(five, torch.stack(expected), atol=1e-6, rtol=1e-6)
    small = {**CONFIG, "input_size": [3, 32, 32], "crop_mode": "squash", "crop_pct": 1.0}
    five = transforms(small, train=False, crops=5)(photo(64, 40))  # 35 x 35, whatever crop_pct is
    expected = [by_hand(photo(64, 40), (35, 35), (x, y, x + 32, y + 32)) for x, y in [(2, 2), (0, 0), (3, 0), (0, 3)]]
    torch.testing.assert_close(five[:4], torch.stack(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "options"),
    [({}, {"crops": 3}), ({}, {"crops": 5, "train": True}), ({"crop_mode": "border"}, {"crops": 5})],
)
def test_crops_that_are_refused(config, options):
    with pytest.raises(ConfigError, match="must be 1 or 5, and 5 only for an evaluation"):
        transforms({**CONFIG, **config}, **{"train": False, **options})


def test_training_crop_is_resized_and_flipped():
    image = photo(90, 60)
    small = {**CONFIG, "input_size": [3, 32, 32]}
    train = transforms(small, train=True, scale=(0.25, 0.5), flip=1)
    torch.manual_seed(5)
    tensor = train(image).flip(-1)
    boxes = []
    for top in range(60):  # find the crop that was drawn
        torch.manual_seed(5)
        crop = train.transforms[0].get_params(image, (0.25, 0.5), (3 / 4, 4 / 3))
        if crop[0] == top:
            boxes.append(crop)
    [(top, left, height, width)] = boxes
    assert 0.24 <= height * width / (90 * 60) <= 0.51
    assert 0.7 <= width / height <= 1.4
    pixels = image.crop((left, top, left + width, top + height))
    torch.testing.assert_close(tensor, by_hand(pixels, (32, 32), (0, 0, 32, 32)), atol=1e-6, rtol=1e-6)


def test_training_crops_cover_the_given_shares():
    """In an image of two ramps, the range of values of a crop gives its width and height."""
    ramps = np.zeros((100, 100, 3), np.uint8)
    ramps[:, :, 0], ramps[:, :, 1] = np.arange(100) * 2, np.arange(100)[:, None] * 2
    config = {**CONFIG, "input_size": [3, 50, 50], "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train = transforms(config, train=True)
        crops = [train(Image.fromarray(ramps)) for _ in range(400)]
    spread = torch.stack([(c.amax((1, 2)) - c.amin((1, 2)))[:2] * 255 / 200 for c in crops])
    areas = spread.prod(1)
    assert 0.04 < areas.min() < 0.15, "down to 8 % of the area"
    assert areas.max() > 0.9
    assert 0.45 < areas.mean() < 0.6, "uniform from 0.08 to 1 has mean 0.54"
    flipped = sum(bool(c[0, 0, 0] > c[0, 0, -1]) for c in crops)
    assert 150 < flipped < 250


def test_draws_come_from_the_generator_of_torch_alone():
    train, image = transforms({**CONFIG, "input_size": [3, 32, 32]}, train=True), photo(80, 80)
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    torch.manual_seed(1)
    tensor = train(image)
    random.random()
    torch.manual_seed(1)
    assert torch.equal(train(image), tensor)
    assert not torch.equal(train(image), tensor)
    random.setstate(state)
    train(image)
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_configuration_of_an_adapter():
    adapter = LongTailPromptAdapter.wrap(tiny_vit())
    preprocess = adapter.backbone.preprocess()
    for train in (True, False):
        assert transforms(preprocess, train)(photo(50, 70)).shape == (3, 32, 32)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1)
    wide = LongTailPromptAdapter.wrap(vit, 2, query="final").backbone.preprocess()
    for train in (True, False):
        image = transforms(wide, train)(photo(50, 70))
        assert image.shape == (3, 32, 48)
        assert image.dtype == torch.float32


def test_the_given_configuration_is_not_changed():
    before = {key: list(value) if isinstance(value, list) else value for key, value in CONFIG.items()}
    transforms(CONFIG, train=False, crop_pct=1)
    assert before == CONFIG


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"input_size": [1, 32, 32]}, {}, "RGB, 3 channels"),
        ({"mean": [0.5]}, {}, "1 means"),
        ({}, {"scale": (0, 1)}, r"scale=\(0, 1\) must be two shares"),
        ({}, {"scale": (0.5, 0.4)}, r"scale=\(0\.5, 0\.4\) must be two shares"),
        ({}, {"ratio": (2, 1)}, r"ratio=\(2, 1\) must be"),
        ({}, {"flip": 1.5}, "flip=1.5 must be a probability"),
        ({}, {"crop_pct": 0}, "crop_pct=0 must be from 0.05 to 1"),
        ({"crop_pct": 1.2}, {}, "crop_pct=1.2 must be"),
    ],
)
def test_refusals(changes, options, words):
    with pytest.raises(ConfigError, match=words):
        transforms({**CONFIG, **changes}, train=True, **options)


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"has no \['interpolation', 'crop_pct', 'crop_mode'\]"):
        transforms({"input_size": [3, 32, 32], "mean": MEAN, "std": STD}, train=False)
