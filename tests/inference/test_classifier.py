"""Classifier, against preprocessing and softmax by hand."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import signal
import threading
import tracemalloc
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpt_peft.data.files.reading import Reading
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.inference import Classifier, Prediction
from lpt_peft.inference import classifier as classifier_module
from tests.conftest import tiny_vit
from tests.inference.sample import NAMES, adapter_of, by_hand, classifier_model_of, described, pictures


@pytest.fixture(scope="module")
def classifier():
    return Classifier(adapter_of(), batch_size=4)


def assert_predictions(predictions, expected, show=7, atol=2e-5):
    """`expected`: probabilities (N, C)."""
    assert len(predictions) == len(expected)
    for prediction, row in zip(predictions, expected, strict=True):
        best = row.argsort(descending=True).tolist()[:show]
        assert prediction.labels == tuple(best)
        assert prediction.label_names == tuple(NAMES[label] for label in best)
        assert prediction.probabilities == pytest.approx(row[best].tolist(), abs=atol)
        assert (prediction.label, prediction.label_name) == (best[0], NAMES[best[0]])
        assert prediction.probability == prediction.probabilities[0]
        assert prediction.error is None


@pytest.mark.parametrize(
    "model",
    [
        adapter_of("shared"),
        adapter_of("group"),
        adapter_of("group", query="block_k"),
        classifier_model_of("linear_probe"),
        classifier_model_of("full"),
    ],
    ids=["shared", "group", "block_k", "linear_probe", "full"],
)
def test_predictions_are_those_of_the_model_on_images_preprocessed_by_hand(model):
    images = pictures(7)
    predictions = Classifier(model, batch_size=3)(images, show=7)
    assert_predictions(predictions, by_hand(model, images))
    assert [prediction.image for prediction in predictions] == [f"image {number}" for number in range(7)]


def test_every_kind_of_image_gives_the_same_prediction(classifier, tmp_path):
    image = pictures(1)[0]
    image.save(tmp_path / "image.png")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    pixels = np.asarray(image)
    kinds = [
        image,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        encoded.getvalue(),
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        classifier.transform(image),
        classifier.transform(image).double(),
    ]
    expected = by_hand(classifier.model, [image])
    for kind in kinds:
        assert_predictions(classifier(kind, show=7), expected)
        assert_predictions(classifier([kind] * 2, show=7), expected.repeat(2, 1))
    assert classifier(kinds[1])[0].image == classifier(kinds[2])[0].image == str(tmp_path / "image.png")
    assert_predictions(classifier(np.stack([pixels] * 3), show=7), expected.repeat(3, 1))
    assert_predictions(classifier(torch.stack([kinds[6]] * 3), show=7), expected.repeat(3, 1))


def test_grey_and_transparent_arrays(classifier):
    grey, alpha = np.asarray(pictures(3)[2]), np.asarray(pictures(2)[1])
    assert (grey.ndim, alpha.shape[2]) == (2, 4)
    images = [Image.fromarray(grey), Image.fromarray(alpha)]
    arrays = [grey, grey[..., None], alpha, torch.from_numpy(grey.copy())[None]]
    first, second = by_hand(classifier.model, images)
    assert_predictions(classifier(arrays, show=7), torch.stack([first, first, second, first]))


def test_groups_are_those_of_the_model(classifier):
    images = pictures(5)
    groups = classifier.model(torch.stack([classifier.transform(image) for image in images]), return_output=True).groups
    assert [prediction.groups for prediction in classifier(images)] == [tuple(row) for row in groups.tolist()]
    assert Classifier(adapter_of("shared"))(images)[0].groups == ()


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(["image", "array", "broken", "missing", "tensor"]), max_size=14),
    batch_size=st.integers(1, 5),
    show=st.integers(1, 7),
)
def test_order_and_errors_do_not_depend_on_batches(kinds, batch_size, show):
    classifier = Classifier(MODEL, batch_size=batch_size)
    image = PICTURE
    items = {
        "image": image,
        "array": np.asarray(image),
        "broken": b"x",
        "missing": "missing.png",
        "tensor": classifier.transform(image),
    }
    predictions = classifier([items[kind] for kind in kinds], show=show)
    assert len(predictions) == len(kinds)
    for position, (kind, prediction) in enumerate(zip(kinds, predictions, strict=True)):
        assert prediction.image == ("missing.png" if kind == "missing" else f"image {position}")
        if kind in ("broken", "missing"):
            assert prediction.error
            assert prediction.labels == prediction.probabilities == prediction.groups == ()
        else:
            assert_predictions([prediction], EXPECTED, show)


MODEL = adapter_of()
PICTURE = pictures(1)[0]
EXPECTED = by_hand(MODEL, [PICTURE])


def test_workers_change_nothing(classifier, tmp_path):
    images = pictures(9)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:80])
    items = [str(tmp_path / f"{number}.png") for number in range(9)]
    items[2], items[3] = images[2], classifier.transform(images[3])
    with_workers = Classifier(classifier.model, batch_size=2, num_workers=2)
    assert with_workers(iter(items)) == Classifier(classifier.model, batch_size=2)(items)
    assert with_workers(items)[4].error
    assert not multiprocessing.active_children()


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def unusual_files():
    """Contents of files in which a PIL image loses its meaning on the way to another process, or cannot be sent."""
    image = pictures(1)[0]
    grey = Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [image.convert("P"), image.rotate(90).convert("P")]
    return {
        "16-bit": encoded(grey, "PNG"),
        "16-bit, white is zero": encoded(grey, "TIFF", tiffinfo={262: 0}),
        "rotated": encoded(image, "JPEG", exif=exif),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "palette with a transparent colour": encoded(frames[0], "PNG", transparency=3),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_an_open_image_is_read_as_its_file(workers):
    files = unusual_files()
    follows_exif = described(adapter_of(), preprocess={"background": [0, 0, 255], "crop_pct": 0.5})
    classifier = Classifier(follows_exif, batch_size=4, num_workers=workers)
    names = [*files, *files]
    items = [*files.values(), *(Image.open(io.BytesIO(content)) for content in files.values())]
    predictions = dict(zip(enumerate(names), classifier(items, show=7), strict=True))
    for position, name in enumerate(files):
        of_file, of_image = predictions[position, name], predictions[position + len(files), name]
        assert of_file.error is None, name
        assert of_image.probabilities == of_file.probabilities, name
    inverted, grey = predictions[1, "16-bit, white is zero"], predictions[0, "16-bit"]
    assert inverted.probabilities != grey.probabilities


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_sent_to_a_worker_does_not_stop_it(classifier, workers):
    truncated = Image.open(io.BytesIO(encoded(PICTURE, "PNG")[:200]))
    pixels = classifier.transform(PICTURE)
    items = [truncated, pixels.clone().requires_grad_() * 1, pixels * float("nan"), pixels.bfloat16(), PICTURE]
    found = Classifier(MODEL, batch_size=2, num_workers=workers)(items, show=7)
    assert "truncated" in found[0].error
    assert found[2].error == "the tensor has values that are NaN or infinite"
    assert_predictions([found[1], found[4]], EXPECTED.repeat(2, 1))
    assert found[3].error is None


def test_copies_of_a_classifier(classifier):
    for other in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert other.model is not classifier.model
        assert other(PICTURE) == classifier(PICTURE)


def test_a_stream_reads_a_bounded_number_of_images_ahead():
    taken = count()
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    endless = (image for _ in taken)
    stream = Classifier(MODEL, batch_size=3, num_workers=2).stream(endless)
    for number in range(40):
        assert next(stream).image == f"image {number}"
        assert next(taken) <= number + 1 + 3 * (3 * 2 + 2) + number  # our own call of next counts as well
    stream.close()
    assert not multiprocessing.active_children()
    stream = Classifier(MODEL, batch_size=3).stream(endless)
    before = next(taken)
    next(stream)
    assert next(taken) - before == 4


def test_a_stream_keeps_no_images():
    classifier = Classifier(MODEL, batch_size=8)
    image = np.zeros((200, 200, 3), dtype=np.uint8)

    def peak(number):
        tracemalloc.start()
        try:
            for _ in classifier.stream(image + 1 for _ in range(number)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)
    assert peak(400) < 1.5 * peak(40)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("before", [0, 1, 4, 7])
def test_errors_of_the_iterable_follow_the_predictions_before_them(workers, before):
    def failing():
        yield from pictures(before)
        raise OSError("the disk is gone")

    classifier = Classifier(MODEL, batch_size=2, num_workers=workers)
    for images, error in ((failing(), OSError), ([*pictures(before), 3, PICTURE], InputError)):
        found = []
        with pytest.raises(error, match=f"the disk is gone|image {before} is a int"):
            deque(map(found.append, classifier.stream(images)), 0)
        assert [prediction.image for prediction in found] == [f"image {number}" for number in range(before)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("empty", [[], (), iter([]), torch.zeros(0, 3, 32, 32), np.zeros((0, 9, 9, 3), np.uint8)])
def test_no_images(classifier, empty):
    assert classifier(empty) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "images is a int: give a path, the bytes"),
        (None, "images is a NoneType"),
        ({"image": "a.png"}, "images is a dict"),
        (io.BytesIO(b"GIF"), r"images is a BytesIO, an open file: give its content, images\.read\(\)"),
        (bytearray(b"GIF"), "images is a bytearray: give a path, the bytes"),
        (SimpleNamespace(ndim=2, __iter__=iter), "images is a SimpleNamespace: give a path"),
        (np.array(3), "images is a ndarray: give a path"),
        ([bytearray(b"GIF")], r"image 0 is a bytearray\. Give a path"),
        (np.float32(1), "images is a float32"),
        ([3], "image 0 is a int. Give a path"),
        ([PICTURE, (PICTURE, 1)], r"image 1 is a tuple; of a data set of pairs, .*\(image for image, label in data\)"),
        (np.zeros((9, 9, 3)), r"image 0 is an array \(9, 9, 3\) of dtype float64; convert its values to 0 to 255"),
        (
            np.zeros((3, 9, 9), np.uint8),
            r"array \(3, 9, 9\) of dtype uint8; its channels must be last: array.transpose",
        ),
        (np.zeros((9, 9, 5), np.uint8), r"array \(9, 9, 5\) of dtype uint8\. Give"),
        (
            torch.zeros(9, 9, 3, dtype=torch.uint8),
            r"tensor \(9, 9, 3\) of dtype uint8; its channels must be first: tensor\.permute",
        ),
        (torch.zeros(3, 9, 9, dtype=torch.int64), r"tensor \(3, 9, 9\) of dtype int64"),
        (
            torch.zeros(3, 9, 9),
            r"tensor \(3, 9, 9\) of dtype float32, and preprocessed images have the shape \(3, 32, 32\)",
        ),
        (torch.zeros(2, 1, 3, 32, 32), r"image 0 is a tensor \(1, 3, 32, 32\)"),
    ],
)
def test_other_types_and_shapes_are_errors(classifier, images, message):
    with pytest.raises(InputError, match=message):
        classifier(images)


def test_unreadable_images_are_noted(classifier, tmp_path):
    (tmp_path / "empty.png").touch()
    truncated = io.BytesIO()
    pictures(1)[0].save(truncated, "PNG")
    lazy = Image.open(io.BytesIO(truncated.getvalue()[:200]))
    deep = Image.fromarray(np.zeros((40, 40), np.float32))
    items = [str(tmp_path / "empty.png"), "nowhere.png", str(tmp_path), b"GIF89a", lazy, deep]
    errors = [prediction.error for prediction in classifier(items)]
    assert errors[0] == "not an image: the file is empty"
    assert errors[1] == "No such file or directory"
    assert errors[2] == "a folder; lpt_peft.inference.image_paths lists its images"
    assert "not an image" in errors[3]
    assert "truncated" in errors[4]
    assert "has no defined white value" in errors[5]
    prediction = classifier(items)[1]
    for name in ("label", "label_name", "probability"):
        with pytest.raises(InputError, match=r"nowhere\.png has no prediction.*No such file.*Check `error`"):
            getattr(prediction, name)
    assert prediction.to_dict() == {"image": "nowhere.png", "error": "No such file or directory"}


def test_tensors_that_are_probably_not_preprocessed_are_warned_of_once(classifier):
    with pytest.warns(UserWarning, match="taken as preprocessed.*from 0 to 1") as found:
        classifier([torch.rand(3, 32, 32) for _ in range(3)])
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier([classifier.transform(image) for image in pictures()])
        classifier(torch.zeros(3, 32, 32))


def test_a_number_of_classes(classifier):
    assert [len(classifier(PICTURE, show=show)[0].labels) for show in (None, 1, 7)] == [5, 1, 7]
    two = Classifier(described(adapter_of(), label_names=None, temperature=None))
    assert two.label_names == tuple("0123456")
    assert two.temperature is None
    plain = by_hand(two.model, [PICTURE], temperature=1.0)[0]
    assert two(PICTURE)[0].probability == pytest.approx(plain.max().item(), abs=2e-5)
    for show in (0, 8, True):
        with pytest.raises(ConfigError, match="show=.* must be an integer from 1 to 7"):
            classifier(PICTURE, show=show)
    for name in ("batch_size", "num_workers"):
        with pytest.raises(ConfigError, match=f"{name}=-1 must be an integer of at least"):
            Classifier(MODEL, **{name: -1})


def test_a_model_in_training_mode_is_refused():
    model = adapter_of().train()
    with pytest.raises(StateError, match=r"training mode.*call model\.eval\(\)"):
        Classifier(model)(PICTURE)


def test_logits_that_are_not_finite_are_an_error():
    model = adapter_of()
    with torch.no_grad():
        model.vit.norm.weight[0] = float("nan")
    with pytest.raises(StateError, match=r"^image 1: the logits are NaN or infinite.*dtype=torch\.float32"):
        Classifier(model)([b"x", PICTURE])


def test_no_gradient_mode_leaks_and_no_generator_is_used(classifier):
    state = torch.get_rng_state()
    for _ in islice(classifier.stream(pictures(9)), 6):
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_dtype_of_the_vit(dtype):
    model = adapter_of(vit=tiny_vit(num_classes=0).to(dtype))
    image = Classifier(model).transform(PICTURE)
    with torch.no_grad():
        expected = (model(image[None].to(dtype)) / 0.7).softmax(1)
    assert_predictions(Classifier(model)(PICTURE, show=7), expected, atol=1e-6)


def test_threads_share_a_classifier(classifier):
    images = pictures(8)
    expected = [classifier(image) for image in images]
    start = threading.Barrier(4)

    def run(_):
        start.wait()
        return [classifier(image) for image in images]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(4)):
            assert found == expected


def test_workers_are_chosen_by_the_number_of_images(monkeypatch):
    asked = []

    def choose(size, batch_bytes):
        asked.append((size, batch_bytes()))
        return 0

    monkeypatch.setattr(classifier_module, "choose_workers", choose)
    automatic = Classifier(MODEL, batch_size=4, num_workers=None)
    automatic([PICTURE, PICTURE])
    automatic(iter([PICTURE]))
    assert asked == [(2, 4 * 3 * 32 * 32 * 4), (None, 4 * 3 * 32 * 32 * 4)]
    for single in (encoded(PICTURE, "PNG"), np.zeros((300, 300, 3), np.uint8), "a" * 300):
        automatic(single)
        assert asked.pop() == (1, 4 * 3 * 32 * 32 * 4)


def test_workers_end_if_the_first_batch_is_interrupted():
    """As by Ctrl-C while a list on standard input is awaited: the loader fails before it is complete."""

    def interrupted():
        yield PICTURE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Classifier(MODEL, batch_size=2, num_workers=2)(interrupted())
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_explained(tmp_path):
    """A decoder may crash the process, or the system may kill it."""
    classifier = Classifier(MODEL, batch_size=1, num_workers=1)
    classifier.transform = Killer()
    with pytest.raises(StateError, match=r"process that reads images was killed.*num_workers=0"):
        classifier(pictures(2))
    assert not multiprocessing.active_children()


class Killer:
    reading = Reading()

    def __call__(self, image):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_prediction_as_json():
    prediction = Prediction(image="a", labels=(2, 0), label_names=("c", "a"), probabilities=(0.75, 0.25), groups=(1,))
    assert prediction.to_dict() == {
        "image": "a",
        "classes": [
            {"class": "c", "label": 2, "probability": 0.75},
            {"class": "a", "label": 0, "probability": 0.25},
        ],
    }
