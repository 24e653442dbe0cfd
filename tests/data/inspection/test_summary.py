"""DataSummary: text and JSON."""

from __future__ import annotations

import json

import pytest

from lpt_peft.data.folder import image_folder
from lpt_peft.data.inspection.summary import DataSummary
from tests.data.make import write_png


def test_summary_of_a_folder(tmp_path):
    for index, name in enumerate(["cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "eel/1.png", "eel/2.png"]):
        write_png(tmp_path / name, index)
    for index in range(4):
        (tmp_path / "cat" / f"{index}.txt").write_text("x")
    (tmp_path / "cat" / "3.png").write_text("broken")
    data = image_folder(tmp_path, unreadable="skip", verify="decode")
    summary = data.summary
    assert (summary.images, summary.num_classes, summary.num_left_out) == (6, 3, 4)
    assert (summary.largest, summary.smallest, summary.empty) == (("cat", 3), ("dog", 1), [])
    assert str(summary).splitlines() == [
        "6 images of 3 classes; largest class cat (3), smallest class dog (1)",
        "4 left out: not an image ending (.txt): cat/0.txt, cat/1.txt, cat/2.txt, ...",
        f"1 cannot be read: {tmp_path / 'cat' / '3.png'}",
    ]
    plain = json.loads(json.dumps(summary.to_dict(names=2)))
    assert plain["left_out"] == [
        {"reason": "not an image ending (.txt)", "count": 4, "files": ["cat/0.txt", "cat/1.txt"]}
    ]
    assert plain["unreadable"] == {"count": 1, "files": [str(tmp_path / "cat" / "3.png")]}
    assert len(summary.to_dict()["left_out"][0]["files"]) == 4
    assert data.subset([0, 3, 4]).summary.num_left_out == 4, "a subset keeps the list of its source"
    with pytest.raises(AttributeError):
        summary.images = 7


def test_names_cannot_rewrite_a_terminal():
    summary = DataSummary(
        2, ["a\x1b[2J", "b"], [1, 1], {"not an image ending (.t\nxt)": ["x\r\x1b[31m"]}, ["\x07"], ["\x9b"]
    )
    assert all(line.isprintable() for line in str(summary).splitlines())
    assert len(str(summary).splitlines()) == 4


def test_smallest_class_has_an_image():
    summary = DataSummary(3, ["a", "b", "c"], [0, 2, 1], {})
    assert (summary.largest, summary.smallest, summary.empty) == (("b", 2), ("c", 1), ["a"])
