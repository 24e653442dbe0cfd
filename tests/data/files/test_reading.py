"""Reading of images compared with arrays computed in numpy: orientation, transparency, modes and deep grey."""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from lpt_peft.data.files import formats
from lpt_peft.data.files.reading import Reading, open_image, read_image
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import ConfigError, InputError

PREPROCESS = {
    "input_size": [3, 6, 6],
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
GREEN = (0, 200, 0)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, format: str, **options) -> Image.Image:
    """The image as read from a file of this format."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return open_image(stream.getvalue())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, bits: int, color: int, *more: bytes) -> bytes:
    """A PNG file written by hand; `pixels` is (H, W) or (H, W, C)."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    raw = b"".join(
        b"\0" + (row.astype(">u2").tobytes() if bits == 16 else row.astype(np.uint8).tobytes()) for row in rows
    )
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(rows: bytes, size: tuple[int, int], bits: int, photometric: int, order: str = "<") -> bytes:
    """An uncompressed grey TIFF file written by hand."""
    tags = [(256, 4, size[0]), (257, 4, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, size[1]), (279, 4, len(rows))]
    entries = b""
    for tag, kind, value in tags:
        data = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, kind, 1) + data
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(rows))
    return head + rows + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def composite(color: np.ndarray, alpha: np.ndarray, background) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * color + (1 - share) * np.array(background)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_orientation(orientation, format):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image = saved(Image.fromarray(pixels), format, exif=exif, **options)
    upright = Reading()(image)
    assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](pixels))
    assert np.array_equal(np.asarray(Reading()(upright)), np.asarray(upright)), "a second call changes nothing"
    ignored = np.asarray(Reading(exif=False)(image))
    # Pillow itself rotates TIFF files when it loads them.
    assert np.array_equal(ignored, UPRIGHT[orientation](pixels) if format == "TIFF" else pixels)


def test_orientation_of_jpeg_and_of_a_transparent_image():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the top half is red
    upright = np.asarray(Reading()(saved(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)))
    assert upright.shape == (32, 16, 3)
    assert upright[2, 8, 0] > 200
    assert upright[29, 8, 0] < 60
    clear = Image.fromarray(np.dstack([pixels, pixels[..., 0]]))
    upright = np.asarray(Reading(background=GREEN)(saved(clear, "PNG", exif=exif)))
    assert (upright[:16] == (255, 0, 0)).all()
    assert (upright[16:] == GREEN).all()


@pytest.mark.parametrize(
    "content", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40, b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_broken_exif_data_do_not_make_an_image_unreadable(content):
    pixels = noise(5, 7, 3)
    image = saved(Image.fromarray(pixels), "PNG", exif=content)
    assert np.array_equal(np.asarray(Reading()(image)), pixels)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), GREEN])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_alpha_is_composited_on_the_background(mode, background):
    color, alpha = noise(9, 8, 3), noise(9, 8)
    if mode in ("LA", "La"):
        color = np.repeat(color[..., :1], 3, axis=2)
    image = Image.fromarray(np.dstack([color, alpha]))
    expected = composite(color, alpha, background)
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "PA":
        color[...] = (10, 20, 30)
        image = Image.new("P", (8, 9))
        image.putpalette([10, 20, 30])
        image = image.convert("PA")
        image.putalpha(Image.fromarray(alpha))
        expected = composite(color, alpha, background)
    elif mode != "RGBA":
        image = image.convert("RGBa") if mode == "RGBa" else image.convert("LA").convert("La")
    assert image.mode == mode
    result = np.asarray(Reading(background=background)(image)).astype(int)
    # Premultiplied colours lose precision, up to half a step of 255 / alpha, times alpha.
    assert np.abs(result - expected).max() <= (2 if mode in ("RGBa", "La") else 1)


@pytest.mark.parametrize("kind", ["P index", "P bytes", "RGB", "L", "1", "GIF"])
def test_transparent_colours(kind):
    if kind in ("P index", "P bytes", "GIF"):
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
        image.putpalette([250, 0, 0, 0, 0, 250])
        options = {"transparency": bytes([0, 255]) if kind == "P bytes" else 0}
        image = saved(image, "GIF" if kind == "GIF" else "PNG", **options)
        expected = [[GREEN, (0, 0, 250)], [(0, 0, 250), GREEN]]
    else:
        values = {"RGB": [[(9, 8, 7), (1, 2, 3)]], "L": [[9, 1]], "1": [[255, 0]]}[kind]
        image = Image.fromarray(np.array(values, np.uint8))
        image = image.convert("1") if kind == "1" else image
        image = saved(image, "PNG", transparency={"RGB": (9, 8, 7), "L": 9, "1": 255}[kind])
        expected = [[GREEN, {"RGB": (1, 2, 3), "L": (1, 1, 1), "1": (0, 0, 0)}[kind]]]
    assert np.array_equal(np.asarray(Reading(background=GREEN)(image)), np.array(expected))


def test_a_palette_with_alpha():
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 0, 250, 255], "RGBA")
    image.putdata([0, 1])
    assert np.asarray(Reading(background=GREEN)(image)).tolist() == [[list(GREEN), [0, 0, 250]]]


RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000", "TIFF MM", "TIFF inverted"])
def test_16_bit_grey_keeps_the_upper_8_bits(format):
    if format.startswith("TIFF "):
        order, photometric = (">", 1) if format == "TIFF MM" else ("<", 0)
        image = open_image(tiff(RAMP.astype(f"{order}u2").tobytes(), (16, 16), 16, photometric, order))
    else:
        image = saved(Image.fromarray(RAMP), format)
    expected = np.arange(256).reshape(16, 16)
    if format == "TIFF inverted":
        expected = 255 - expected
    rgb = np.asarray(Reading()(image))
    assert rgb.shape == (16, 16, 3)
    assert all(np.array_equal(rgb[..., channel], expected) for channel in range(3))


def test_12_bit_grey_is_scaled_by_its_bit_depth():
    values = np.arange(0, 4096, 16).reshape(16, 16)
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, ((first & 15) << 4) | (second >> 8), second & 255], axis=1).astype(np.uint8)
    image = open_image(tiff(packed.tobytes(), (16, 16), 12, 1))
    assert np.array_equal(np.asarray(image), values), "Pillow unpacks 12 bits"
    assert np.array_equal(np.asarray(Reading()(image))[..., 0], np.arange(256).reshape(16, 16))


def test_transparent_16_bit_grey():
    pixels = np.array([[0x1234, 0x1200], [0xFFFF, 0]])
    image = open_image(png(pixels, 16, 0, chunk(b"tRNS", struct.pack(">H", 0x1234))))
    rows = [[list(GREEN), [0x12] * 3], [[255] * 3, [0] * 3]]
    assert np.asarray(Reading(background=GREEN)(image)).tolist() == rows


@pytest.mark.parametrize(("bits", "packed"), [(1, 0b10110001), (2, 0b00011011), (4, 0x01)])
def test_transparent_grey_of_few_bits(bits, packed):
    """Eight bits of pixels; the transparent value is that of the last pixel, 1 or the largest."""
    count, largest = 8 // bits, 2**bits - 1
    values = [packed >> (8 - bits * (place + 1)) & largest for place in range(count)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", count, 1, bits, 0, 0, 0, 0))
    for hidden_value in {values[-1], 0}:
        transparent = chunk(b"tRNS", struct.pack(">H", hidden_value))
        data = chunk(b"IDAT", zlib.compress(bytes([0, packed])))
        file = b"\x89PNG\r\n\x1a\n" + header + transparent + data + chunk(b"IEND", b"")
        pixels = np.asarray(read_image(file, Reading(background=GREEN)))[0].tolist()
        assert pixels == [list(GREEN) if v == hidden_value else [v * 255 // largest] * 3 for v in values]


def test_transparent_16_bit_colour():
    pixels = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0x8000]]])
    file = png(pixels, 16, 2, chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)))
    assert np.asarray(read_image(file, Reading(background=GREEN))).tolist() == [[list(GREEN), [0xFF, 0, 0x80]]]


def test_16_bit_colour_is_read_with_8_bits():
    pixels = np.random.default_rng(1).integers(0, 65536, (5, 4, 3))
    assert np.array_equal(np.asarray(read_image(png(pixels, 16, 2))), pixels >> 8)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((3, 3), 0.5, np.float32)), r"floating-point grey \(mode F, values from 0.5 to 0.5\)"),
        (Image.fromarray(np.array([[-3, 70_000]], np.int32)), r"integer grey \(mode I, values from -3 to 70000\)"),
    ],
)
@pytest.mark.parametrize("format", [None, "TIFF"])
def test_grey_without_a_white_value_is_refused(image, words, format):
    if format:
        image = saved(image, format)
    with pytest.raises(InputError, match=f"{words} has no defined white value. Scale"):
        Reading()(image)


def test_colour_models():
    values = noise(6, 5, 4).astype(int)
    cyan, key = values[..., :3], values[..., 3:]
    expected = (255 - cyan) * (255 - key) / 255
    result = np.asarray(Reading()(saved(Image.fromarray(values.astype(np.uint8), "CMYK"), "TIFF"))).astype(int)
    assert np.abs(result - expected).max() <= 1
    luma, blue, red = (values[..., i].astype(float) for i in range(3))
    expected = np.stack(
        [
            luma + 1.402 * (red - 128),
            luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luma + 1.772 * (blue - 128),
        ],
        axis=-1,
    ).clip(0, 255)
    image = Image.fromarray(values[..., :3].astype(np.uint8), "YCbCr")
    assert np.abs(np.asarray(Reading()(image)).astype(int) - expected).max() <= 1.5
    bits = noise(5, 9) > 127
    assert np.array_equal(np.asarray(Reading()(saved(Image.fromarray(bits), "TIFF")))[..., 1], 255 * bits)
    hues = Image.merge("HSV", [Image.new("L", (1, 1), value) for value in (170, 255, 255)])  # 240 degrees
    assert np.abs(np.asarray(Reading()(hues))[0, 0].astype(int) - (0, 0, 255)).max() <= 6


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow converts LAB with littlecms")
@pytest.mark.parametrize("lab", [(53, 0, 0), (60, 40, 30), (40, -30, 20), (90, -5, -10), (100, 0, 0), (0, 0, 0)])
def test_lab(lab):
    """CIE L*a*b* with white D50, adapted to D65 by Bradford, then the sRGB curve."""
    height = (lab[0] + 16) / 116
    curve = [height + lab[1] / 500, height, height - lab[2] / 200]
    xyz = [value**3 if value > 6 / 29 else 3 * (6 / 29) ** 2 * (value - 4 / 29) for value in curve]
    xyz = np.array(xyz) * (0.9642, 1.0, 0.8249)
    to_linear = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    linear = np.clip(np.array(to_linear) @ xyz, 0, 1)
    srgb = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    stored = [round(lab[0] * 255 / 100), lab[1] + 128, lab[2] + 128]  # in memory; TIFF stores signed values
    image = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in stored])
    assert np.abs(np.asarray(Reading()(saved(image, "TIFF")))[0, 0] - srgb).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250))]
    options = {"lossless": True} if format == "WEBP" else {}
    image = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(Reading()(image)) == (250, 0, 0)).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer; run `git lfs pull`"),
        (b"<!DOCTYPE html><p>404", "an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo; pip install pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no format is known that starts with b'%!PS-Ado'"),
    ],
)
def test_files_that_are_not_images_are_described(content, words, tmp_path):
    (tmp_path / "1.png").write_bytes(content)
    for file in (content, tmp_path / "1.png", str(tmp_path / "1.png"), io.BytesIO(content)):
        with pytest.raises(OSError, match=f"not an image: .*{words}"):
            open_image(file)


def test_settings():
    assert Reading.from_preprocess({}) == Reading(True, (255, 255, 255))
    settings = Reading(False, (1, 2, 3))
    assert Reading.from_preprocess({**PREPROCESS, **settings.to_preprocess()}) == settings
    assert settings.to_preprocess() == {"exif": False, "background": [1, 2, 3]}
    tensor = torch.zeros(3, 2, 2)
    assert Reading()(tensor) is tensor
    for background in ((1, 2), (0, 0, 256), (0, 0, -1), (0.5, 0, 0), "white", 255, (True, 0, 0)):
        with pytest.raises(ConfigError, match="must be three integers from 0 to 255"):
            Reading(background=background)
    for exif in (1, "yes", None):
        with pytest.raises(ConfigError, match="must be True or False"):
            Reading(exif=exif)


@pytest.fixture
def folder(tmp_path):
    """A rotated transparent image in each of two classes."""
    exif = Image.Exif()
    exif[0x0112] = 8
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pixels = np.dstack([noise(6, 6, 3), np.full((6, 6), 100, np.uint8)])
        Image.fromarray(pixels).save(tmp_path / name / "1.png", exif=exif)
    return tmp_path


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("background", [(255, 255, 255), GREEN])
def test_all_consumers_see_the_same_pixels(folder, exif, background):
    color = np.rot90(noise(6, 6, 3)) if exif else noise(6, 6, 3)
    expected = composite(color, np.full((6, 6), 100), background)
    options = {"exif": exif, "background": background}
    plain = image_folder(folder, **options)
    assert np.abs(np.asarray(plain[0][0]) - expected).max() <= 1
    transform = transforms(PREPROCESS, train=False, **options)
    results = [
        image_folder(folder, transform=transform)[1][0],
        transform(open_image(folder / "a" / "1.png")),  # as `lpt-peft predict`
        from_dataset([(open_image(folder / "a" / "1.png"),)] * 2, [0, 1], transform=transform)[0][0],
        transforms({**PREPROCESS, **Reading(**options).to_preprocess()}, train=False)(open_image(folder / "a/1.png")),
        image_folder(folder, transform=transform).subset([0, 1])[0][0],
    ]
    for result in results:
        assert np.abs(255 * result.permute(1, 2, 0).numpy() - expected).max() <= 1.001
        assert torch.equal(result, results[0])


def test_settings_that_contradict_the_transform_are_refused(folder):
    transform = transforms(PREPROCESS, train=True, exif=False)
    with pytest.raises(ConfigError, match="exif=True of the data contradicts exif=False of the transform"):
        image_folder(folder, transform=transform, exif=True)
    data = image_folder(folder, background=GREEN)
    with pytest.raises(ConfigError, match=r"background=\(0, 200, 0\) of the data contradicts"):
        data.transform = transform
    data.transform = transforms(PREPROCESS, train=True, background=GREEN)
    assert data.reading == Reading(True, GREEN)


def test_a_refused_mode_counts_as_unreadable(folder):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "a" / "0.tif")
    with pytest.raises(InputError, match=r"0\.tif \(index 0\) cannot be read: .*no defined white value"):
        image_folder(folder)[0]
    data = image_folder(folder, unreadable="skip")
    assert data[0][0].size == (6, 6)
    assert data.skipped == [str(folder / "a" / "0.tif")]


def test_installed_heif_plugin_is_registered(monkeypatch):
    calls = []
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: calls.append(1)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    formats._register_plugins.cache_clear()
    formats.image_endings()
    formats.image_endings()
    formats._register_plugins.cache_clear()
    assert calls == [1]


def test_a_registered_plugin_adds_its_endings(monkeypatch):
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert ".heic" not in formats.image_endings(), "an ending without an opener"
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert ".heic" in formats.image_endings()
    assert formats.readable_formats().count("HEIF") == 1
    assert len(set(formats.readable_formats())) == len(formats.readable_formats())
