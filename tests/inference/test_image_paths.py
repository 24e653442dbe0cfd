"""Image files of paths, folders and patterns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lpt_peft.errors import InputError
from lpt_peft.inference import image_paths


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.PNG", "c/x.webp", "c/d/y.jpeg", "c/notes.txt", ".git/z.png", "c/._x.webp", "e/none.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


IMAGES = ["./a.PNG", "./b.jpg", "./c/x.webp", "./c/d/y.jpeg"]


def test_folders_are_read_at_any_depth_in_the_order_of_names(tree):
    assert list(image_paths(".")) == IMAGES
    assert list(image_paths(tree)) == [f"{tree}/{path[2:]}" for path in IMAGES]
    assert list(image_paths(["c/d", Path("b.jpg"), "c"])) == ["c/d/y.jpeg", "b.jpg", "c/x.webp", "c/d/y.jpeg"]


def test_files_are_returned_as_they_are(tree):
    assert list(image_paths(["nowhere.png", "c/notes.txt", "./c//x.webp"])) == [
        *("nowhere.png", "c/notes.txt", "./c//x.webp")
    ]


def test_patterns(tree):
    assert list(image_paths("*.jpg")) == ["b.jpg"]
    assert list(image_paths("c/**/*.*")) == ["c/d/y.jpeg", "c/notes.txt", "c/x.webp"]
    assert list(image_paths("c/**")) == ["c/d/y.jpeg", "c/notes.txt", "c/x.webp"]
    assert list(image_paths("[bc]*")) == ["b.jpg", "c/x.webp", "c/d/y.jpeg"], "images of folders that a pattern matches"
    (tree / "[bc].jpg").touch()
    assert list(image_paths("[bc].jpg")) == ["[bc].jpg"], "a path that exists is not a pattern"


def test_links_are_followed_but_no_folder_is_entered_twice(tree):
    (tree / "c" / "up").symlink_to(tree)
    (tree / "c" / "again").symlink_to(tree / "c" / "d")
    (tree / "c" / "itself").symlink_to("itself")
    (tree / "c" / "photo.png").symlink_to(tree / "a.PNG")
    expected = ["c/photo.png", "c/x.webp", "c/d/y.jpeg", "c/up/a.PNG", "c/up/b.jpg"]
    assert list(image_paths("c")) == expected


def test_pipes_are_left_out_and_broken_links_are_not(tree):
    """A broken link is reported when it is read; a pipe would wait for a writer."""
    os.mkfifo(tree / "c" / "d" / "pipe.png")
    (tree / "c" / "d" / "broken.png").symlink_to("nowhere.png")
    assert list(image_paths("c/d")) == ["c/d/broken.png", "c/d/y.jpeg"]


@pytest.mark.parametrize(
    ("place", "message"),
    [("e", "The folder e has no image: check the path."), ("*.tiff", r"No file matches \*\.tiff: check the path.")],
)
def test_nothing_found_is_an_error(tree, place, message):
    with pytest.raises(InputError, match=message):
        list(image_paths(["b.jpg", place]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every folder")
def test_a_closed_folder_is_an_error(tree):
    (tree / "c" / "d").chmod(0)
    try:
        with pytest.raises(InputError, match=r"c/d cannot be read: .*Change its permissions"):
            list(image_paths("c"))
    finally:
        (tree / "c" / "d").chmod(0o755)


def test_folders_are_read_while_they_are_iterated(tree):
    found = image_paths(["b.jpg", "later"])
    assert next(found) == "b.jpg"
    (tree / "later").mkdir()
    (tree / "later" / "z.png").touch()
    assert list(found) == ["later/z.png"]
