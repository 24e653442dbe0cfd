"""Image lists, the JSON of iNaturalist and class folders; torchvision is the reference."""

from __future__ import annotations

import json
import os

import pytest
from torchvision.datasets import ImageFolder

from lpt_peft.data.folder import image_folder
from lpt_peft.data.image_list import image_list
from lpt_peft.data.inaturalist import inaturalist
from lpt_peft.errors import InputError, UnlabelledError
from tests.data.make import color, seen, write_png

PLACES = ["data_256/a/airfield/00001.png 0", "data_256/b/my beach/x  y.png 1", "data_256/b/my beach/2.png 1"]


@pytest.fixture
def places(tmp_path):
    """A list like that of Places-LT, with a path that contains spaces, and its images."""
    for index, line in enumerate(PLACES):
        path, label = line.rsplit(" ", 1)
        write_png(tmp_path / "images" / path, index, int(label))
    (tmp_path / "train.txt").write_text("\n".join(PLACES) + "\n")
    return tmp_path


def test_image_list(places):
    data = image_list(places / "train.txt", places / "images", verify="decode")
    assert (data.labels, data.class_names, data.class_counts) == ([0, 1, 1], ["0", "1"], [1, 2])
    assert [seen(image) for image, _ in data] == [color(0, 0), color(1, 1), color(2, 1)]
    named = image_list(places / "train.txt", places / "images", ["airfield", "beach"], transform=lambda image: 5)
    assert named.class_names == ["airfield", "beach"]
    assert named[2] == (5, 1)


def test_image_list_of_other_systems(places):
    text = "\ufeff" + "\r\n\r\n".join(line.replace(".png ", ".png\t") for line in PLACES)
    (places / "crlf.txt").write_bytes(text.encode())  # byte-order mark, CRLF, tabs, empty lines, no final newline
    data = image_list(places / "crlf.txt", places / "images", verify="decode")
    assert data.labels == [0, 1, 1]


def test_image_list_with_paths_that_are_not_utf8(places):
    name = os.fsdecode(b"caf\xe9.png")
    write_png(places / "images" / name, 7)
    (places / "latin.txt").write_bytes(b"caf\xe9.png 0\n" + PLACES[1].encode())
    assert seen(image_list(places / "latin.txt", places / "images")[0][0]) == color(7)


def test_validation_list_with_the_class_names_of_training(places):
    (places / "val.txt").write_text(PLACES[2])
    split = image_list(places / "val.txt", places / "images", ["a", "b", "c"], allow_empty=True)
    assert (split.class_counts, split[0][1]) == ([0, 1, 0], 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a.png", "line 2: 'a.png' is not"),
        ("7", "line 2: '7' is not"),
        ("a.png x", "line 2: 'a.png x' is not"),
        ("a.png -1", "integers of at least 0"),
        ("a.png 1.0", "integer of at least 0"),
        ("a.png,1", "line 2: 'a.png,1'"),
        ("a.png 1_0", "line 2"),
        ("a.png 99999999999999999999", "line 2"),
    ],
)
def test_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "list.txt").write_text(f"b.png 0\n{line}\n")
    with pytest.raises(InputError, match=words):
        image_list(tmp_path / "list.txt", tmp_path)


def test_bad_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="is empty"):
        image_list(tmp_path / "empty.txt", tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        image_list(tmp_path / "none.txt", tmp_path)
    (tmp_path / "gap.txt").write_text("a.png 0\nb.png 2\n")
    with pytest.raises(InputError, match="the first is label 1"):
        image_list(tmp_path / "gap.txt", tmp_path)
    (tmp_path / "fine.txt").write_text("a.png 0\nb.png 1\n")
    with pytest.raises(InputError, match=r"root='.*elsewhere' is not a folder"):
        image_list(tmp_path / "fine.txt", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="2 of 2 images are missing"):
        image_list(tmp_path / "fine.txt", tmp_path, verify="exists")


def inat_json(**changes):
    """The layout of train2018.json; ids have gaps, and images and annotations are in different orders."""
    more = {"license": 3, "rights_holder": "x", "width": 6, "height": 5}
    images = [
        {"id": 11, "file_name": "train_val2018/Aves/9/b.png", **more},
        {"id": 10, "file_name": "train_val2018/Aves/4/a.png", **more},
        {"id": 15, "file_name": "train_val2018/Aves/9/c.png", **more},
    ]
    return {
        "info": {"year": 2018, "version": "1.0", "contributor": "", "description": "", "url": "", "date_created": ""},
        "images": images,
        "licenses": [{"id": 3, "name": "CC", "url": "u"}],
        "categories": [
            {"id": 9, "name": "nine", "supercategory": "Aves"},
            {"id": 4, "name": "four", "supercategory": "Aves"},
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 4},
            {"id": 2, "image_id": 15, "category_id": 9},
            {"id": 3, "image_id": 11, "category_id": 9},
        ],
        **changes,
    }


def write_inat(folder, **changes):
    (folder / "train2018.json").write_text(json.dumps(inat_json(**changes)))
    return folder / "train2018.json"


def test_inaturalist(tmp_path):
    for index, image in enumerate(inat_json()["images"]):
        write_png(tmp_path / image["file_name"], index)
    data = inaturalist(write_inat(tmp_path), tmp_path, verify="decode")
    assert (data.labels, data.class_names, data.class_counts) == ([1, 0, 1], ["four", "nine"], [1, 2])
    assert [seen(image) for image, _ in data] == [color(0), color(1), color(2)]
    more = [*inat_json()["categories"], {"id": 2}]
    split = inaturalist(write_inat(tmp_path, categories=more), tmp_path, allow_empty=True)
    assert (split.labels, split.class_names) == ([2, 1, 2], ["2", "four", "nine"])


def test_inaturalist_with_equal_names_of_different_categories(tmp_path):
    categories = [{"id": 9, "name": "Oenanthe"}, {"id": 4, "name": "Oenanthe"}]
    data = inaturalist(write_inat(tmp_path, categories=categories), tmp_path)
    assert (data.labels, data.class_names) == ([1, 0, 1], ["Oenanthe (0)", "Oenanthe (1)"])


IMAGES, ANNOTATIONS = inat_json()["images"], inat_json()["annotations"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": ANNOTATIONS[:2]}, r"image 11 \(train_val2018/Aves/9/b.png\) has no annotation"),
        ({"annotations": [*ANNOTATIONS, ANNOTATIONS[0]]}, "image 10 has two annotations"),
        ({"images": IMAGES[:2]}, "1 annotations refer to images that are missing"),
        ({"categories": [{"id": 9}]}, "image 10 has category 4, which is missing"),
        ({"categories": [{"id": "9"}]}, "'categories' must be a list whose entries have an integer as id"),
        ({"annotations": None}, "has no annotations"),
        ({"annotations": {}, "images": []}, "'annotations' must be a list whose entries have image_id and category_id"),
        ({"images": [{"id": 1}]}, "'images' must be a list whose entries have id and file_name"),
        ({"images": [], "annotations": []}, "lists no image"),
        ({"categories": [{"id": 1}, {"id": 4}, {"id": 9}]}, r"no image; the first is label 0 \('1'\)"),
    ],
)
def test_bad_inaturalist(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        inaturalist(write_inat(tmp_path, **changes), tmp_path)


def test_categories_of_another_file_are_refused(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 3}],
        "categories": [{"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert inaturalist(tmp_path / "val.json", tmp_path, ["b", "c"], allow_empty=True).labels == [1]
    with pytest.raises(InputError, match="2 categories that differ from the 3 of the training set"):
        inaturalist(tmp_path / "val.json", tmp_path, ["a", "b", "c"], allow_empty=True)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_files_that_are_not_json(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        inaturalist(tmp_path / "x.json", tmp_path)


def test_json_of_another_format(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="not an iNaturalist annotation file"):
        inaturalist(tmp_path / "x.json", tmp_path)


@pytest.fixture
def folders(tmp_path):
    """Class folders with nested folders, other files and upper-case names."""
    files = ["dog/1.png", "dog/old/2.PNG", "cat/9.png", "cat/a b.png", "Zebra/x.png"]
    for index, name in enumerate(files):
        write_png(tmp_path / name, index)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not a class")
    return tmp_path


def test_image_folder_agrees_with_torchvision(folders):
    data, reference = image_folder(folders, verify="decode"), ImageFolder(str(folders))
    assert (data.labels, data.class_names) == (reference.targets, reference.classes)
    assert [seen(image) for image, _ in data] == [seen(image) for image, _ in reference]
    assert [data.images.name(index) for index in range(5)] == [path for path, _ in reference.samples]
    assert image_folder(f"{folders}/").labels == data.labels


def test_validation_folder_with_the_class_names_of_training(folders, tmp_path_factory):
    val = tmp_path_factory.mktemp("val")
    write_png(val / "dog" / "v.png", 3)
    names = image_folder(folders).class_names
    data = image_folder(val, names, allow_empty=True)
    assert (data.labels, data.class_counts) == ([2], [0, 0, 1])
    with pytest.raises(InputError, match="2 of 3 classes have no image"):
        image_folder(val, names)
    write_png(val / "wolf" / "v.png", 3)
    with pytest.raises(InputError, match=r"missing in class_names: \['wolf'\]"):
        image_folder(val, names, allow_empty=True)


def test_bad_folders(folders, tmp_path_factory):
    with pytest.raises(InputError, match="is not a folder"):
        image_folder(folders / "none")
    with pytest.raises(InputError, match="has no class folder"):
        image_folder(folders / "cat")
    (folders / "fox").mkdir()
    with pytest.raises(InputError, match=r"1 of 4 classes have no image; the first is label 3 \('fox'\)"):
        image_folder(folders)
    bare = tmp_path_factory.mktemp("bare")
    (bare / "cat").mkdir()
    with pytest.raises(InputError, match="contain no image"):
        image_folder(bare)
    write_png(bare / "cat" / "1.png", 0)
    with pytest.raises(InputError, match="belong to the same class"):
        image_folder(bare)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png 3 1\n", r"line 1: 'a\.png 3 1' has 3 columns, .* Keep 'a\.png' and a single label"),
        ("a.png 3 0.5 1\n", "has 4 columns"),
        ("1 a.png 3\n", r"starts with a number before the path 'a\.png'\. Remove the first column"),
        ("3 a.png\n", "The label comes first here"),
        ("a.png,3\n", r"files that end in \.csv: rename"),
        ("a.png, 3\nb.png, x\n", "line 2"),
        ("a.png -1\n", "remove lines of images without a label"),
        ("a.png 1.0\n", "Write the label as an integer"),
        ("a.png cat\n", "or one of class_names="),
    ],
)
def test_advice_for_bad_lists(tmp_path, text, words):
    write_png(tmp_path / "a.png", 0)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        image_list(tmp_path / "list.txt", tmp_path)


def test_paths_that_look_like_several_columns_but_exist(tmp_path):
    for index, name in enumerate(["a.png copy", "2 b.png", "c.png"]):
        write_png(tmp_path / f"{name}.png", index)
        (tmp_path / f"{name}.png").rename(tmp_path / name)
    (tmp_path / "list.txt").write_text("a.png copy 0\n2 b.png 1\nc.png 1\n")
    data = image_list(tmp_path / "list.txt", tmp_path, verify="decode")
    assert [seen(image) for image, _ in data] == [color(0), color(1), color(2)]


def test_quoted_paths_and_names_as_labels(places):
    (places / "quoted.txt").write_text(f"\"{PLACES[1][:-2]}\" beach\n  '{PLACES[0][:-2]}'\t0\n")
    data = image_list(places / "quoted.txt", places / "images", ["airfield", "beach"], verify="decode")
    assert data.labels == [1, 0]


def test_lists_without_labels_are_unlabelled(tmp_path):
    (tmp_path / "test.txt").write_text("a.png\nb.png\n")
    (tmp_path / "test.csv").write_text("path\na.png\n")
    for name in ("test.txt", "test.csv"):
        with pytest.raises(UnlabelledError, match="label"):
            image_list(tmp_path / name, tmp_path)


def test_lists_in_utf16_are_refused(tmp_path):
    for name in ("list.txt", "list.csv"):
        (tmp_path / name).write_text("a.png,0\n", encoding="utf-16")
        with pytest.raises(InputError, match="is UTF-16 text; save it as UTF-8"):
            image_list(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ((1, 2, 3), "Labels start at 1: subtract 1 from each"),
        ((0, 2, 3), "the first is label 1. Number the classes that have images 0 to 2 without a gap"),
        ((0, 0, 0), "belong to the same class"),
    ],
)
def test_labels_with_gaps(tmp_path, labels, words):
    (tmp_path / "list.txt").write_text("".join(f"{label}.png {label}\n" for label in labels))
    with pytest.raises(InputError, match=words):
        image_list(tmp_path / "list.txt", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", "my beach/1.png,1\n2.png,0\n"),
        ("header.csv", "path,label\nmy beach/1.png,1\n2.png,0\n"),
        ("crlf.csv", "\ufeffFile Name;Class ID\r\n\r\nmy beach/1.png;1\r\n2.png;0"),
        ("quoted.csv", '"label","image"\n1,"my beach/1.png"\n"0", 2.png\n'),
        ("first.csv", "1,my beach/1.png\n0,2.png\n"),
        ("other.csv", "bild,klasse\nmy beach/1.png,1\n2.png,0\n"),
        ("wide.csv", "id,path,width,label\n7,my beach/1.png,6,1\n8,2.png,6,0\n"),
        ("tabs.tsv", "path\tlabel\nmy beach/1.png\t1\n2.png\t0\n"),
        ("upper.CSV", "PATH,LABEL\nmy beach/1.png,1\n2.png,0\n"),
    ],
)
def test_tables(tmp_path, name, text):
    write_png(tmp_path / "my beach" / "1.png", 1)
    write_png(tmp_path / "2.png", 2)
    (tmp_path / name).write_bytes(text.encode())
    data = image_list(tmp_path / name, tmp_path, verify="decode")
    assert (data.labels, data.class_names) == ([1, 0], ["0", "1"])
    assert [seen(image) for image, _ in data] == [color(1), color(2)]
    header = name not in ("plain.csv", "first.csv")
    assert [note.startswith("the first row is read as a header") for note in data.summary.notes] == [True] * header


def test_tables_with_class_names(tmp_path):
    (tmp_path / "train.csv").write_text("image,class\n1.png,sea lion\n2.png,cat\n3.png,cat\n")
    train = image_list(tmp_path / "train.csv", tmp_path)
    assert (train.labels, train.class_names) == ([1, 0, 0], ["cat", "sea lion"])
    (tmp_path / "val.csv").write_text("image,class\n4.png,cat\n")
    val = image_list(tmp_path / "val.csv", tmp_path, train.class_names, allow_empty=True)
    assert (val.labels, val.class_names) == ([0], ["cat", "sea lion"])
    (tmp_path / "val.csv").write_text("image,class\n4.png,dog\n")
    with pytest.raises(InputError, match=r"missing in class_names: \['dog'\]"):
        image_list(tmp_path / "val.csv", tmp_path, train.class_names, allow_empty=True)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "is empty"),
        ("path,label\n", {}, "is empty"),
        ("a.png,0,x\nb.png,1,y\n", {}, r"has 3 columns, \['a\.png', '0', 'x'\].* Add a header"),
        ("path,image,label\na,b,1\n", {}, "has 3 columns"),
        ("path,label\na.png,0\nb.png\n", {}, "line 3: 'b.png' has no path or no label"),
        ("path,label\na.png,0\nb.png,cat\n", {}, "both integers and names as labels, such as '0' and 'cat'"),
        ("path,label\na.png,0.0\nb.png,1.0\n", {}, r"has the label '0\.0'\. Write labels as integers"),
        ("path,label\na.png,-1\nb.png,1\n", {}, "has the label '-1'.*remove rows of images without a label"),
        ("path,label\na.png,0\n", {"label_column": "kind"}, r"no column label_column='kind'; the columns are \['path'"),
    ],
)
def test_bad_tables(tmp_path, text, options, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        image_list(tmp_path / "list.csv", tmp_path, **options)


def test_columns_of_a_table_can_be_chosen(tmp_path):
    (tmp_path / "list.csv").write_text("path,thumb,label,fine\na.png,x.png,0,1\nb.png,y.png,1,0\n")
    data = image_list(tmp_path / "list.csv", tmp_path, path_column="thumb", label_column="fine")
    assert (data.labels, data.images.name(0)) == ([1, 0], str(tmp_path / "x.png"))


def test_missing_files_are_noted(tmp_path):
    (tmp_path / "list.txt").write_text("train\\a.png 0\ntrain\\b.png 1\n")
    [note] = image_list(tmp_path / "list.txt", tmp_path).summary.notes
    assert note.startswith("none of 2 files that were looked for exists below")
    assert note.endswith("paths with \\ are those of Windows")
    (tmp_path / "kaggle.csv").write_text("id,breed\na1,dog\nb1,cat\n")
    assert image_list(tmp_path / "kaggle.csv", tmp_path).summary.notes[1].endswith("have no ending such as .jpg")
    write_png(tmp_path / "train\\b.png", 0)
    assert not image_list(tmp_path / "list.txt", tmp_path).summary.notes


def test_repeated_paths_are_noted(tmp_path):
    lines = [f"{index}.png {index % 2}" for index in range(50)]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "7.png 1", "8.png 1", "7.png 1"]))
    notes = image_list(tmp_path / "list.txt", tmp_path).summary.notes
    assert "3 lines repeat a path, 1 of them with another label, such as 7.png" in notes or (
        "3 lines repeat a path, 1 of them with another label, such as 8.png" in notes
    )
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert not any("lines repeat" in note for note in image_list(tmp_path / "list.txt", tmp_path).summary.notes)


@pytest.mark.parametrize("ending", ["txt", "csv"])
@pytest.mark.parametrize(
    ("labels", "merged"),
    [
        (["0", "1", "01"], "'01', '1'"),
        (["001", "0", "01"], "'001', '01'"),
        (["00", "1", "0"], "'0', '00'"),
        (["00", "01", "01"], None),
        (["0", "1", "10"], None),
    ],
)
def test_labels_that_differ_in_leading_zeros_are_noted(tmp_path, ending, labels, merged):
    separator = "," if ending == "csv" else " "
    lines = [f"{index}.png{separator}{label}\n" for index, label in enumerate(labels)]
    (tmp_path / f"list.{ending}").write_text("".join(lines))
    data = image_list(tmp_path / f"list.{ending}", tmp_path, [str(index) for index in range(11)], allow_empty=True)
    assert data.labels == list(map(int, labels))
    notes = [note for note in data.summary.notes if "leading zeros" in note]
    text = "labels that differ only in leading zeros are the same class, such as"
    assert notes == ([] if merged is None else [f"{text} {merged}"])


def test_classes_of_a_table_that_look_alike_are_noted(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n1.png,cat\n2.png,Cat\n3.png,dog\n")
    data = image_list(tmp_path / "list.csv", tmp_path)
    assert data.class_names == ["Cat", "cat", "dog"]
    assert "classes whose names differ only in case, spaces or invisible characters: 'Cat', 'cat'" in data.summary.notes


def test_a_column_of_splits(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("path,label,Split,id\n1.png,0,train,7\n2.png,1,train,8\n3.png,1,TEST,9\n")
    with pytest.raises(InputError, match="several splits, test, train, in the column 'Split'. Write a file for each"):
        image_list(file, tmp_path)
    file.write_text("path,label,subset\n1.png,0,train\n2.png,1,\n")
    with pytest.raises(InputError, match="several splits, others, train, in the column 'subset'"):
        image_list(file, tmp_path, path_column="path", label_column="label")
    file.write_text("path,label,split,id\n1.png,0,train,7\n2.png,1,train,8\n")
    data = image_list(file, tmp_path)
    assert data.labels == [0, 1]
    assert "the first row is read as a header: path, label, split, id; not used: split, id" in data.summary.notes
    file.write_text("path,label,fold\n1.png,0,1\n2.png,1,2\n")
    assert image_list(file, tmp_path).labels == [0, 1], "numbered folds are no splits"


@pytest.mark.parametrize("line", ['{"path": "1.png", "label": 0}', '{"path":"1.png","label":0}', '[["1.png",0],'])
def test_json_lines_get_their_own_advice(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="looks like JSON. Write lines like") as caught:
        image_list(tmp_path / "list.jsonl", tmp_path)
    assert ".csv" not in str(caught.value)


def test_inaturalist_without_annotations_is_unlabelled(tmp_path):
    content = inat_json()
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(UnlabelledError, match="has no annotations"):
        inaturalist(tmp_path / "test.json", tmp_path)
