"""Evaluation of splits with unreadable images."""

from __future__ import annotations

import pytest

from lpt_peft.data.folder import image_folder
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics
from lpt_peft.recipe import evaluate, predict
from tests.recipe.tiny import COUNTS, folder_with_a_broken_image, tiny_adapter


def metrics():
    return ShotMetrics.from_rule("lpt", COUNTS)


def open_images(folder, adapter, unreadable="skip"):
    return image_folder(folder, transform=transforms(adapter.backbone.preprocess(), train=False), unreadable=unreadable)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_not_counted(tmp_path, workers):
    folder_with_a_broken_image(tmp_path)
    for file in (tmp_path / "class 2").iterdir():  # no image of a class can be read
        file.write_bytes(b"")
    (tmp_path / "class 0" / "00.png").write_bytes(b"")
    adapter = tiny_adapter()
    images = open_images(tmp_path, adapter)
    with pytest.warns(UserWarning, match="5 of 31 images cannot be read; they are left out of the counts") as caught:
        result = evaluate(adapter, images, metrics(), batch_size=2, num_workers=workers)
    assert len([item for item in caught if "cannot be read" in str(item.message)]) == 1
    assert result.num_images == 19 + 7
    with pytest.raises(InputError, match="00.png .* cannot be read"):
        evaluate(adapter, open_images(tmp_path, adapter, "error"), metrics())


def test_a_split_without_a_readable_image(tmp_path):
    folder_with_a_broken_image(tmp_path)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    adapter = tiny_adapter()
    with pytest.warns(UserWarning, match="31 of 31"), pytest.raises(InputError, match="None of the 31 images can be"):
        evaluate(adapter, open_images(tmp_path, adapter), metrics())


def test_predictions_have_a_row_for_every_image(tmp_path):
    folder_with_a_broken_image(tmp_path)
    adapter = tiny_adapter()
    output, labels = predict(adapter, open_images(tmp_path, adapter))
    assert len(output.logits) == len(labels) == 31
