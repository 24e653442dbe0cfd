"""Pictures of a push: names, contents, and the mark of this library."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lpt_peft.errors import InputError
from lpt_peft.hub.pictures import check_pictures


def png(seed=0, side=8):
    stream = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def test_a_marked_picture_has_the_same_pixels():
    marked = check_pictures({"accuracy.png": png()})
    image = Image.open(BytesIO(marked["accuracy.png"]))
    image.verify()  # all checksums
    image = Image.open(BytesIO(marked["accuracy.png"]))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(png()))))
    assert image.text == {"Source": "lpt_peft"}
    assert check_pictures(marked) == marked  # a picture that was pulled


@pytest.mark.parametrize("name", ["accuracy.jpg", "../accuracy.png", "a/b.png", ".png", "a b.png", "a.png\n", 3])
def test_names(name):
    with pytest.raises(InputError, match=r'must be like "accuracy\.png"'):
        check_pictures({name: png()})


@pytest.mark.parametrize("data", [b"", b"GIF89a", "text", png()[:8], bytearray(png())])
def test_contents(data):
    with pytest.raises(InputError, match=r"a\.png must be the bytes of a PNG file"):
        check_pictures({"a.png": data})


def test_a_picture_of_many_megabytes_is_refused():
    with pytest.raises(InputError, match="at most 8,388,608: draw it smaller"):
        check_pictures({"a.png": png(side=1800)})
