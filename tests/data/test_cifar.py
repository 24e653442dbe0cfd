"""CIFAR-LT from small archives in the layout of the originals.

torchvision verifies MD5 sums. The tests replace its sums by those of the small archives, so a changed byte is refused
here as well.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import struct

import numpy as np
import pytest
import torchvision

from lpt_peft.data.cifar import cifar_lt
from lpt_peft.data.long_tail import cifar_lt_indices
from lpt_peft.errors import ConfigError, InputError

PER_CLASS, TEST_PER_CLASS = 10, 2


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as `str` of Python 2, as in the original archives."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_py2_str(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin-1")
        head = b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))
        self.write(head + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_py2_str


def python2_pickle(content):
    """Pickle with protocol 2 and the numpy module name of 2009."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def archive(rng, labels, key):
    """Content of a batch file: rows of 1024 red, 1024 green and 1024 blue values."""
    data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    names = [b"%d.png" % index for index in range(len(labels))]
    content = {b"batch_label": b"a batch", key: [int(label) for label in labels], b"data": data, b"filenames": names}
    if key == b"fine_labels":
        content[b"coarse_labels"] = [int(label) // 5 for label in labels]
    return content


def write(folder, batches, meta, monkeypatch, kind):
    """Write the files and give torchvision their MD5 sums."""
    folder.mkdir()
    sums = {}
    for name, content in {**batches, **meta}.items():
        raw = python2_pickle(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()
    [meta_name] = meta
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in batches if not name.startswith("test")])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name in batches if name.startswith("test")])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[meta_name]})
    return batches


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    train, test = (rng.permutation(np.repeat(np.arange(100), n)) for n in (PER_CLASS, TEST_PER_CLASS))
    batches = {"train": archive(rng, train, b"fine_labels"), "test": archive(rng, test, b"fine_labels")}
    meta = {b"fine_label_names": [b"fine_%d" % j for j in range(100)], b"coarse_label_names": [b"c"] * 20}
    return write(tmp_path / "cifar-100-python", batches, {"meta": meta}, monkeypatch, torchvision.datasets.CIFAR100)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(10), 50)).reshape(5, 100)
    batches = {f"data_batch_{j + 1}": archive(rng, labels[j], b"labels") for j in range(5)}
    batches["test_batch"] = archive(rng, rng.permutation(np.repeat(np.arange(10), 3)), b"labels")
    meta = {b"num_cases_per_batch": 100, b"label_names": [b"name_%d" % j for j in range(10)], b"num_vis": 3072}
    return write(
        tmp_path / "cifar-10-batches-py", batches, {"batches.meta": meta}, monkeypatch, torchvision.datasets.CIFAR10
    )


def kept(labels, counts):
    """Trap 13 by brute force: numpy's global generator with seed 0 shuffles each class; the first n_j are kept."""
    state = np.random.get_state()
    try:
        np.random.seed(0)
        rows = []
        for label, count in enumerate(counts):
            indices = np.array([index for index, other in enumerate(labels) if other == label])
            np.random.shuffle(indices)
            rows += list(indices[:count])
    finally:
        np.random.set_state(state)
    return rows


def pixel(rows, index, y, x):
    return tuple(int(rows[index, 1024 * channel + 32 * y + x]) for channel in range(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy: the module name in old pickles
def test_archives_have_the_layout_of_the_originals(cifar100):
    raw = python2_pickle(cifar100["test"])
    assert raw[:3] == b"\x80\x02}"
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(raw)}
    assert {"SHORT_BINSTRING", "BINSTRING", "BININT1"} <= opcodes
    assert not opcodes & {"BINUNICODE", "SHORT_BINBYTES", "BINBYTES"}
    keys = {b"data", b"fine_labels", b"coarse_labels", b"filenames", b"batch_label"}
    content = pickle.loads(raw, encoding="bytes")
    assert content.keys() == keys
    assert content[b"data"].dtype == np.uint8
    assert content[b"data"].shape == (100 * TEST_PER_CLASS, 3072)
    assert np.array_equal(content[b"data"], cifar100["test"][b"data"])


def test_cifar_100_lt(cifar100, tmp_path):
    raw = cifar100["train"]
    counts = [int(PER_CLASS * (1 / 5) ** (j / 99)) for j in range(100)]
    rows = kept(raw[b"fine_labels"], counts)
    data = cifar_lt(tmp_path, "cifar100", imbalance=5)
    assert data.class_counts == counts
    assert (counts[0], counts[-1]) == (10, 2)
    assert data.labels == [raw[b"fine_labels"][row] for row in rows]
    assert data.class_names[:2] == ["fine_0", "fine_1"]
    for position, row in list(enumerate(rows))[::37]:
        image, label = data[position]
        assert (image.size, image.mode, label) == ((32, 32), "RGB", raw[b"fine_labels"][row])
        for y, x in ((0, 0), (3, 29), (31, 1)):
            assert image.getpixel((x, y)) == pixel(raw[b"data"], row, y, x)


def test_cifar_100_test_split_is_complete(cifar100, tmp_path):
    data = cifar_lt(str(tmp_path), train=False)
    assert data.labels == cifar100["test"][b"fine_labels"]
    assert data.class_counts == [TEST_PER_CLASS] * 100
    assert data[7][0].getpixel((5, 2)) == pixel(cifar100["test"][b"data"], 7, 2, 5)


@pytest.mark.parametrize("kind", ["exp", "step"])
def test_cifar_10_lt(cifar10, tmp_path, kind):
    labels = [label for name in sorted(cifar10)[:5] for label in cifar10[name][b"labels"]]
    counts = [int(50 * 0.1 ** (j / 9)) for j in range(10)] if kind == "exp" else [50] * 5 + [5] * 5
    data = cifar_lt(tmp_path, "cifar10", 10, kind, transform=lambda image: image.size)
    rows = kept(labels, counts)
    assert data.class_counts == counts
    assert data.labels == [labels[row] for row in rows]
    assert data[0] == ((32, 32), 0)
    plain = cifar_lt(tmp_path, "cifar10", 10, kind)
    batch, row = divmod(rows[-1], 100)
    assert plain[len(rows) - 1][0].getpixel((9, 4)) == pixel(cifar10[f"data_batch_{batch + 1}"][b"data"], row, 4, 9)
    assert cifar_lt(tmp_path, "cifar10", train=False).class_names[9] == "name_9"


def test_missing_archives(tmp_path, cifar100):
    with pytest.raises(InputError, match=r"lacks cifar-10-batches-py/ with data_batch_1, .*Download https"):
        cifar_lt(tmp_path, "cifar10")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(InputError, match=r"Unpack .*cifar-10-python\.tar\.gz there"):
        cifar_lt(tmp_path, "cifar10")
    (tmp_path / "cifar-100-python" / "meta").unlink()
    with pytest.raises(InputError, match=r"root='.*' lacks cifar-100-python/ with meta\. Download"):
        cifar_lt(tmp_path)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_changed_byte_is_refused(tmp_path, cifar100, name):
    file = tmp_path / "cifar-100-python" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"differ from the original archive \(MD5\)\. Download"):
        cifar_lt(tmp_path)


def test_bad_settings(tmp_path, cifar100):
    with pytest.raises(ConfigError, match="name='cifar20'"):
        cifar_lt(tmp_path, "cifar20")
    with pytest.raises(ConfigError, match="imbalance >= 1"):
        cifar_lt(tmp_path, imbalance=0.01)
    with pytest.raises(ConfigError, match="no image"):
        cifar_lt(tmp_path, imbalance=100)  # of ten images per class
    with pytest.raises(ConfigError, match='kind=\'linear\' must be "exp" or "step"'):
        cifar_lt(tmp_path, kind="linear")


@pytest.mark.parametrize(
    ("classes", "per_class", "imbalance", "last", "total"),
    [(100, 500, 100, 5, 10_847), (100, 500, 50, 10, 12_608), (100, 500, 10, 50, 19_573), (10, 5000, 100, 50, None)],
)
def test_subset_of_labels_as_large_as_cifar(classes, per_class, imbalance, last, total):
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(classes), per_class)).tolist()
    counts = [int(per_class * (1 / imbalance) ** (j / (classes - 1))) for j in range(classes)]
    indices = cifar_lt_indices(labels, imbalance)
    assert indices == kept(labels, counts)
    found = np.bincount([labels[index] for index in indices])
    assert (found[0], found[-1]) == (per_class, last)
    assert total is None or len(indices) == total


def test_step_subset_of_labels_as_large_as_cifar():
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(100), 500)).tolist()
    for imbalance, tail in ((100, 5), (50, 10), (10, 50)):
        assert cifar_lt_indices(labels, imbalance, "step") == kept(labels, [500] * 50 + [tail] * 50)
