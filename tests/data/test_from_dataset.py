"""Map-style datasets: torchvision, timm, tensors, wrappers and custom classes, with listed or given labels."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import MNIST, SVHN, FakeData, Flowers102, ImageFolder

from lpt_peft import DualSampler
from lpt_peft.data.folder import image_folder
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.long_tail import make_long_tailed
from lpt_peft.errors import InputError
from tests.data.make import color, seen, write_png


class Custom(Dataset):
    """Images of the colour of their index; further attributes are given by keyword."""

    def __init__(self, item_labels, **attributes):
        self.item_labels = item_labels
        self.reads = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.item_labels)

    def __getitem__(self, index):
        self.reads += 1
        return Image.new("RGB", (2, 2), color(index)), self.item_labels[index]


@pytest.fixture
def folder(tmp_path):
    """Three classes with 3, 2 and 1 images."""
    for index, name in enumerate(["cat/0.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png", "eel/5.png"]):
        write_png(tmp_path / name, index)
    return tmp_path


LABELS = [0, 0, 0, 1, 1, 2]


def test_labels_and_names_of_torchvision_and_timm(folder):
    for dataset in (ImageFolder(str(folder)), ImageDataset(str(folder))):
        data = from_dataset(dataset)
        assert data.labels == LABELS
        assert [seen(image) for image, _ in data] == [color(index) for index in range(6)]
    assert from_dataset(ImageFolder(str(folder))).class_names == ["cat", "dog", "eel"]
    assert from_dataset(ImageDataset(str(folder))).class_names == ["cat", "dog", "eel"]


def bare(kind, **attributes):
    """A dataset of torchvision without its files."""
    dataset = kind.__new__(kind)
    for name, value in {"transform": None, "target_transform": None, **attributes}.items():
        setattr(dataset, name, value)
    return dataset


def test_datasets_of_torchvision_by_their_attributes(tmp_path):
    digits = bare(MNIST, data=torch.zeros(20, 4, 4, dtype=torch.uint8), targets=torch.arange(10).repeat(2))
    data = from_dataset(digits)
    assert (data.labels, data.class_names[7]) == (list(range(10)) * 2, "7 - seven")
    svhn = bare(SVHN, data=np.zeros((4, 3, 5, 5), np.uint8), labels=np.array([0, 1, 1, 0]))
    assert from_dataset(svhn).labels == [0, 1, 1, 0]
    for index in range(3):
        write_png(tmp_path / f"{index}.png", index)
    files = [tmp_path / f"{index}.png" for index in range(3)]
    flowers = bare(Flowers102, _image_files=files, _labels=[1, 0, 1], classes=["a", "b"])
    assert (from_dataset(flowers).labels, from_dataset(flowers).class_names) == ([1, 0, 1], ["a", "b"])
    merged = bare(Flowers102, _image_files=files, _labels=[1, 0, 1], target_transform=lambda label: 1 - label)
    assert from_dataset(merged).labels == [0, 1, 0]


def test_target_transform_numbers_labels_and_names(folder):
    dataset = ImageFolder(str(folder), target_transform=lambda label: (label + 1) % 3)
    data = from_dataset(dataset)
    assert data.labels == [label for _, label in dataset] == [1, 1, 1, 2, 2, 0]
    assert data.class_names == ["eel", "cat", "dog"]
    assert data.class_counts == [1, 3, 2]
    merged = from_dataset(ImageFolder(str(folder), target_transform=lambda label: min(label, 1)))
    assert (merged.labels, merged.class_names) == ([0, 0, 0, 1, 1, 1], ["0", "1"])
    tensor = from_dataset(ImageFolder(str(folder), target_transform=torch.tensor))
    assert (tensor.labels, tensor.class_names) == (LABELS, ["cat", "dog", "eel"])
    kept = from_dataset(Subset(dataset, [5, 0, 3]))
    assert (kept.labels, kept.class_names) == ([0, 1, 2], ["eel", "cat", "dog"])


def test_subsets_and_concatenations(folder):
    base = ImageFolder(str(folder))
    data = from_dataset(Subset(Subset(base, [5, 3, 1, 0]), [3, 0, 1]))
    assert (data.labels, data.class_names) == ([0, 2, 1], ["cat", "dog", "eel"])
    assert [seen(image) for image, _ in data] == [color(index) for index in (0, 5, 3)]
    both = from_dataset(ConcatDataset([base, Subset(base, [3])]))
    assert both.labels == [*LABELS, 1]
    first, _ = random_split(base, [5, 1], generator=torch.Generator().manual_seed(0))
    split = from_dataset(first, class_names=base.classes, allow_empty=True)
    assert split.labels == [base.targets[index] for index in first.indices]
    other = Custom([0, 1, 2], targets=[0, 1, 2], classes=["dog", "cat", "eel"])
    with pytest.raises(InputError, match=r"different classes.*\['cat', 'dog', 'eel'\] and \['dog', 'cat', 'eel'\]"):
        from_dataset(ConcatDataset([base, other]))
    with pytest.raises(InputError, match="ConcatDataset lists no labels"):
        from_dataset(ConcatDataset([base, Custom([0, 1, 2])]))


def test_wrappers(folder):
    class Wrapper(Dataset):
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            return self.dataset[index]

    class Reversed(Wrapper):
        def __getitem__(self, index):
            return self.dataset[len(self) - 1 - index]

    base = ImageFolder(str(folder))
    assert from_dataset(Wrapper(base)).labels == LABELS
    with pytest.raises(InputError, match=r"Reversed lists label 0 for item 0 in `dataset\.targets`, but .* label 2\."):
        from_dataset(Reversed(base))
    again = from_dataset(image_folder(folder))
    assert (again.labels, again.class_names) == (LABELS, ["cat", "dog", "eel"])
    with pytest.raises(InputError, match="DataLoader is not map-style"):
        from_dataset(DataLoader(base))


def test_tensors_and_transforms():
    images, targets = torch.rand(6, 3, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    for labels in (None, targets):
        data = from_dataset(TensorDataset(images, targets), labels, transform=lambda image: -image)
        assert data.labels == targets.tolist()
        assert torch.equal(data[4][0], -images[4])
    subset = data.subset(make_long_tailed(data.labels, 3))
    assert subset.class_counts == [3, 1]
    assert all(any(torch.equal(image, -row) for row in images) for image, _ in subset)
    assert len(list(DualSampler(subset.labels, 4))) == 3
    with pytest.raises(InputError, match="lists no labels"):
        from_dataset(TensorDataset(images, torch.eye(6)))


def test_lists_of_pairs_paths_and_bytes(tmp_path):
    write_png(tmp_path / "1.png", 1)
    stream = io.BytesIO()
    Image.new("RGB", (3, 3), color(2)).save(stream, "PNG")
    data = from_dataset([(str(tmp_path / "1.png"), 1), (stream.getvalue(), 0), (tmp_path / "1.png", np.int64(1))])
    assert data.labels == [1, 0, 1]
    assert [seen(image) for image, _ in data] == [color(1), color(2), color(1)]


def test_items_that_are_dictionaries():
    rows = [{"picture": Image.new("RGB", (2, 2), color(index)), "label": index % 2} for index in range(4)]
    with pytest.raises(InputError, match=r"keys \['picture', 'label'\]; pass image_key="):
        from_dataset(rows, [0, 1, 0, 1])[0]
    data = from_dataset(rows, [0, 1, 0, 1], image_key="picture")
    assert seen(data[3][0]) == color(3)


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels", "y", "samples"])
def test_listed_labels_are_compared_with_the_items(attribute):
    right = [0, 1, 1, 0, 2, 1, 0, 0, 1, 2]
    listed = [(f"{label}.png", label) for label in right] if attribute == "samples" else right
    assert from_dataset(Custom(right, **{attribute: listed})).labels == right
    wrong = [label if index != 4 else 1 for index, label in enumerate(right)]
    listed = [(f"{label}.png", label) for label in wrong] if attribute == "samples" else wrong
    with pytest.raises(InputError, match=rf"lists label 1 for item 4 in `{attribute}`, but the item has label 2"):
        from_dataset(Custom(right, **{attribute: listed}))


@pytest.mark.parametrize("item", [torch.tensor(1), np.int64(1), np.array(1), 1])
def test_labels_of_items_may_be_scalars_of_any_kind(item):
    assert from_dataset(Custom([item, 0, item], targets=[1, 0, 1])).labels == [1, 0, 1]
    with pytest.raises(InputError, match="lists label 0 for item 0"):
        from_dataset(Custom([item, 0, item], targets=[0, 0, 1]))


def test_given_labels_that_differ_are_noted_and_used():
    dataset = Custom([0, 1, 2, 3], targets=[0, 1, 2, 3], classes=["a", "b", "c", "d"])
    data = from_dataset(dataset, [0, 0, 1, 1])
    assert (data.labels, data.class_names) == ([0, 0, 1, 1], ["0", "1"]), "the names are those of other labels"
    assert "note: the given labels differ from those of the items, for example item 1: 0 given, 1 in the item" in str(
        data.summary
    )
    assert not from_dataset(dataset, [0, 1, 2, 3]).summary.notes
    assert from_dataset(dataset, [0, 1, 2, 3]).class_names == ["a", "b", "c", "d"]


def test_a_few_items_are_read_and_the_random_state_is_kept():
    class Random(Custom):
        def __getitem__(self, index):
            random.random(), np.random.rand(), torch.rand(())
            return super().__getitem__(index)

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    dataset = Random([index % 2 for index in range(5000)], targets=[index % 2 for index in range(5000)])
    from_dataset(dataset)
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == expected
    assert 8 <= dataset.reads <= 264


def test_unreadable_items_do_not_stop_the_comparison():
    class Broken(Custom):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("broken")
            return super().__getitem__(index)

    data = from_dataset(Broken([0, 1, 0], targets=[0, 1, 0]), unreadable="skip")
    assert seen(data[0][0]) == color(2)


def test_class_names_in_the_order_of_class_to_idx():
    dataset = Custom([0, 1], targets=[0, 1], class_to_idx={"dog": 1, "cat": 0})
    assert from_dataset(dataset).class_names == ["cat", "dog"]
    dataset.classes = ["dog", "cat"]
    assert from_dataset(dataset).class_names == ["cat", "dog"]
    dataset = Custom([0, 1], targets=[0, 1], classes={1: "dog", 0: "cat"})
    assert from_dataset(dataset).class_names == ["cat", "dog"]
    gaps = Custom([0, 1], targets=[0, 1], class_to_idx={"dog": 5, "cat": 0})
    assert from_dataset(gaps).class_names == ["0", "1"]


def test_equal_names_of_different_classes_stay_apart():
    """torchvision's ImageNet lists tuples of synonyms, and two classes named crane."""
    classes = [("crane",), ("maillot", "tank suit"), ("crane",)]
    dataset = Custom([0, 1, 2], targets=[0, 1, 2], classes=classes)
    assert from_dataset(dataset).class_names == ["crane (0)", "maillot, tank suit", "crane (2)"]


def test_labels_attribute_and_given_names():
    class Small:
        labels = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Image.new("L", (2, 2), index), "more", "things"

    data = from_dataset(Small(), class_names=["x", "y"])
    assert (data.class_names, data[1][0].mode, data[1][0].getpixel((0, 0))) == (["x", "y"], "RGB", (1, 1, 1))


GREY = np.zeros((2, 2, 3), np.uint8)
WITHOUT_LISTED_LABELS = {
    "dictionaries": (lambda label: {"id": "x", "photo": "a", "image": Image.fromarray(GREY), "label": label}, "image"),
    "other keys": (lambda label: {"pixels": torch.zeros(3, 2, 2), "kind": np.int64(label)}, "pixels"),
    "label first": (lambda label: (label, Image.fromarray(GREY)), 1),
    "label first, tensor": (lambda label: (torch.tensor(label), torch.zeros(3, 2, 2)), 1),
    "shape (1,)": (lambda label: (Image.fromarray(GREY), np.array([label])), 0),
    "one-hot": (lambda label: (Image.fromarray(GREY), torch.eye(3)[label]), 0),
    "three values": (lambda label: (Image.fromarray(GREY), label, "more"), 0),
}


@pytest.mark.parametrize("name", WITHOUT_LISTED_LABELS)
@pytest.mark.parametrize("as_list", [True, False])
def test_the_advice_without_labels_can_be_followed(name, as_list):
    """The arguments in the message are evaluated, and give the labels."""
    item, image_key = WITHOUT_LISTED_LABELS[name]
    labels = [0, 2, 1, 1]

    class Plain(Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return item(labels[index])

    dataset = list(map(item, labels)) if as_list else Plain()
    if as_list and name == "three values":
        assert from_dataset(dataset).labels == labels
        return
    with pytest.raises(InputError, match="lists no labels: ") as caught:
        from_dataset(dataset)
    expression, _, key = str(caught.value).removesuffix(".").rpartition("Pass labels=")[2].partition(" and image_key=")
    expression = expression[expression.index("[") : expression.rindex("]") + 1]
    data = from_dataset(dataset, eval(expression, {"dataset": dataset}), image_key=eval(key or "0"))
    assert data.labels == labels
    assert eval(key or "0") == image_key
    assert np.asarray(data[1][0]).shape in ((2, 2, 3), (3, 2, 2))


@pytest.mark.parametrize(
    ("target", "call"),
    [(torch.tensor([[0], [2], [1]]), r"\.flatten\(\)\.tolist"), (torch.eye(3)[[0, 2, 1]], r"\.argmax\(1\)\.tolist")],
)
def test_the_advice_for_tensors(target, call):
    dataset = TensorDataset(torch.zeros(3, 3, 4, 4), target)
    with pytest.raises(InputError, match=rf"tensors\[1\] has the shape \(3, .*tensors\[1\]{call}") as caught:
        from_dataset(dataset)
    expression = str(caught.value).removesuffix(".").rpartition("Pass labels=")[2]
    assert from_dataset(dataset, eval(expression, {"dataset": dataset})).labels == [0, 2, 1]


def test_items_without_labels():
    with pytest.raises(InputError, match="its items are of type Image, without a label. Pass labels=, the class of"):
        from_dataset([Image.fromarray(GREY)] * 3)
    with pytest.raises(InputError, match="tensors.0., without|type tuple, without a label"):
        from_dataset(TensorDataset(torch.zeros(3, 3, 4, 4)))
    for labels in (None, []):
        with pytest.raises(InputError, match="list is empty: it has no image"):
            from_dataset([], labels)


def test_refusals():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(InputError, match="Stream is not map-style"):
        from_dataset(Stream())
    with pytest.raises(InputError, match=r"FakeData lists no labels.*\[dataset\[i\]\[1\] for i in range"):
        from_dataset(FakeData(3))
    with pytest.raises(InputError, match="2 labels do not match 3 images"):
        from_dataset(FakeData(3), [0, 1])
    with pytest.raises(InputError, match="labels must be"):
        from_dataset(Custom(["cat", "dog"], targets=["cat", "dog"]))
    datasets = pytest.importorskip("datasets")
    with pytest.raises(InputError, match="call from_huggingface"):
        from_dataset(datasets.Dataset.from_dict({"label": [0, 1]}))
