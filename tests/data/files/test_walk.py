"""Class folders: random trees against an independent walk, and links, junk and look-alikes case by case."""

# The oracle works on plain strings.
# ruff: noqa: PTH110, PTH112, PTH113, PTH114, PTH122, PTH208

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lpt_peft.data.files.walk import (
    BROKEN,
    CLOSED,
    HIDDEN,
    IGNORED,
    NOT_REGULAR,
    OUTSIDE,
    REPEATED,
    ClassFolders,
)
from lpt_peft.data.folder import image_folder
from lpt_peft.errors import InputError, UnlabelledError
from tests.data.make import color, seen, write_png

JUNK = ["._1.png", ".DS_Store", ".hidden.jpg", "Thumbs.db", "desktop.ini", "~$draft.png", "THUMBS.DB", "Icon\r"]
JUNK_FOLDERS = [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found", "$RECYCLE.BIN", ".thumbnails"]
ENDINGS = [".png", ".PNG", ".gif", ".jfif", ".webp", ".bmp", ".tiff", ".ppm", ".jp2", ".avif", ".tga", ".mpo"]
OTHER = [".txt", ".json", "", ".pdf", ".eps", ".mp4", ".heic", ".png.part", ".npy"]
NAMES = ["a", "B", "b", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "x y", "\N{CJK UNIFIED IDEOGRAPH-732B}", "d.png"]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def names(found: ClassFolders, reason: str) -> list[str]:
    return sorted(found.left_out.get(reason, ()))


def images(found: ClassFolders) -> dict[str, list[str]]:
    listed: dict[str, list[str]] = {name: [] for name in found.class_names}
    for path, label in zip(found.paths, found.labels, strict=True):
        listed[found.class_names[label]].append(path)
    return listed


@st.composite
def trees(draw):
    """Files, folders and links to create, as relative paths; links point to any of them, or nowhere."""
    folders, files, links = [], [], []
    for name in draw(st.sets(st.sampled_from(NAMES), min_size=1, max_size=4)):
        folders.append(name)
        for _ in range(draw(st.integers(0, 2))):
            folders.append(f"{draw(st.sampled_from([f for f in folders if f.split('/')[0] == name]))}/sub")
    folders += [f"{draw(st.sampled_from([*folders, '.']))}/{draw(st.sampled_from(JUNK_FOLDERS))}" for _ in range(2)]
    folders = list(dict.fromkeys(os.path.normpath(folder) for folder in folders))
    for _ in range(draw(st.integers(0, 14))):
        folder = draw(st.sampled_from([*folders, "."]))
        stem = draw(st.sampled_from(["1", "2", "\N{LATIN SMALL LETTER E WITH ACUTE}", "x y"]))
        name = draw(
            st.one_of(
                st.sampled_from(JUNK),
                st.sampled_from(ENDINGS).map(stem.__add__),
                st.sampled_from(OTHER).map(stem.__add__),
            )
        )
        files.append(os.path.normpath(f"{folder}/{name}"))
    for number in range(draw(st.integers(0, 4))):
        folder = draw(st.sampled_from([*folders, "."]))
        target = draw(
            st.sampled_from([*folders, *files, ".", "..", "nowhere", "OUTSIDE", "OUTSIDE/deep", "OUTSIDE/o.png"])
        )
        ending = draw(st.sampled_from(["", ".png", ".txt"]))
        links.append((os.path.normpath(f"{folder}/link{number}{ending}"), target))
    return folders, sorted(set(files)), links


HIDDEN_NAMES = {name.lower() for name in [*JUNK, *JUNK_FOLDERS]}


def hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def walk_by_hand(root: str) -> tuple[Counter[str], int]:
    """Images per class from the rules, with `find`-like recursion over real paths; number of broken links."""
    top = os.path.realpath(root)
    readable = {ending.lower() for ending in ENDINGS}
    seen_folders: dict[str, str] = {}  # real folder -> class
    counts: Counter[str] = Counter()
    broken = 0

    def visible(folder):
        return [entry for entry in sorted(os.listdir(folder)) if not hidden(entry)]

    def collect(folder, label):
        if os.path.realpath(folder) in seen_folders:
            return
        seen_folders[os.path.realpath(folder)] = label
        counts.setdefault(label, 0)
        for entry in visible(folder):
            if os.path.isdir(f"{folder}/{entry}") and not os.path.islink(f"{folder}/{entry}"):
                collect(f"{folder}/{entry}", label)

    for entry in visible(root):
        if os.path.isdir(f"{root}/{entry}") and not os.path.islink(f"{root}/{entry}"):
            collect(f"{root}/{entry}", entry)
    # Links to folders, in order of their paths, until no new folder is found.
    shown = {folder: folder.replace(top, root, 1) for folder in seen_folders}
    done: set[str] = set()
    while True:
        candidates = [f"{root}/{entry}" for entry in visible(root)]
        candidates += [f"{shown[folder]}/{entry}" for folder in seen_folders for entry in visible(folder)]
        fresh = sorted(path for path in candidates if os.path.islink(path) and os.path.isdir(path) and path not in done)
        if not fresh:
            break
        link = fresh[0]
        done.add(link)
        real = os.path.realpath(link)
        label = link[len(root) + 1 :].split("/")[0]
        if real in seen_folders or f"{top}/".startswith(f"{real.rstrip('/')}/"):
            continue
        before = set(seen_folders)
        collect(link, label)
        for folder in set(seen_folders) - before:
            shown[folder] = link + folder[len(real) :]
    file_links = []
    for folder, label in seen_folders.items():
        for entry in visible(folder):
            path = f"{folder}/{entry}"
            if os.path.isdir(path):
                continue
            if not os.path.exists(path):
                broken += 1
                continue
            if os.path.splitext(entry)[1].lower() not in readable or not os.path.isfile(path):
                continue
            if os.path.islink(path):
                file_links.append((shown[folder], entry, os.path.realpath(path), label))
                continue
            counts[label] += 1
    taken = set()
    for _, _, real, label in sorted(file_links):
        place, name = os.path.split(real)
        counted = place in seen_folders and not hidden(name) and os.path.splitext(name)[1].lower() in readable
        counts[label] += not counted and real not in taken
        taken.add(real)
    broken += sum(not os.path.exists(f"{root}/{entry}") for entry in visible(root))
    return counts, broken


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_random_trees_are_counted_as_by_an_independent_walk(tree):
    folders, files, links = tree
    base = tempfile.mkdtemp()
    try:
        root, outside = Path(base, "inner", "data"), Path(base, "elsewhere")
        for name in ("o.png", "deep/p.gif", "deep/notes.txt", "deep/.q.png"):
            touch(outside / name)
        root.mkdir(parents=True)
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (root / file).exists():
                touch(root / file)
        for link, target in links:
            place = root / link
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_symlink():
                place.symlink_to(Path(str(outside) + target[7:]) if target.startswith("OUTSIDE") else root / target)
        found = ClassFolders(root)
        counts, broken = walk_by_hand(str(root))
        assert found.class_names == sorted(counts)
        assert Counter({name: len(paths) for name, paths in images(found).items()}) == counts
        assert all((root / path).is_file() for path in found.paths)
        assert len(set(found.paths)) == len(found.paths)
        assert len(names(found, BROKEN)) == broken
        # Nothing is lost: what the walk met is an image or is listed, once.
        listed = [name for entries in found.left_out.values() for name in entries]
        assert len(listed) == len(set(listed))
        for file in files:
            above = [hidden(part) for part in Path(file).parts]
            if any(above):
                first = Path(*Path(file).parts[: above.index(True) + 1])
                assert str(first) in names(found, HIDDEN)
            else:
                assert (file in listed) != (file in found.paths)
    finally:
        shutil.rmtree(base)


def test_hidden_and_system_entries_at_any_depth(tmp_path):
    for index, name in enumerate(["a/1.png", "a/deep/2.png", "b/3.png"]):
        write_png(tmp_path / name, index)
    for folder in ("", "a", "a/deep", "b"):
        for junk in JUNK:
            touch(tmp_path / folder / junk)
        for junk in JUNK_FOLDERS:
            touch(tmp_path / folder / junk / "copy.png")
    data = image_folder(tmp_path, verify="decode")
    assert (data.class_names, data.class_counts) == (["a", "b"], [2, 1])
    assert [seen(image) for image, _ in data] == [color(index) for index in range(3)]
    assert data.summary.num_left_out == 4 * len({*JUNK, *JUNK_FOLDERS})
    assert set(data.summary.left_out) == {HIDDEN}
    assert "a/deep/__MACOSX" in data.summary.left_out[HIDDEN]


def test_links_back_into_the_tree_add_nothing(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "outside"
    write_png(root / "a" / "1.png", 1)
    write_png(root / "b" / "2.png", 2)
    write_png(outside / "3.png", 3)
    write_png(outside / "sub" / "4.png", 4)
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "top").symlink_to(tmp_path)
    (root / "a" / "other").symlink_to(root / "b")
    (root / "again").symlink_to(root / "a")
    (root / "b" / "same.png").symlink_to(root / "a" / "1.png")
    (root / "b" / "more").symlink_to(outside)
    (root / "b" / "more2").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (outside / "self").symlink_to(outside)
    (root / "b" / "single.png").symlink_to(outside.parent / "single.png")
    (root / "b" / "twice.png").symlink_to(outside.parent / "single.png")  # of several links the first counts
    write_png(tmp_path / "single.png", 5)
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    (root / "b" / "circle.png").symlink_to("circle.png")
    found = ClassFolders(root)
    assert images(found) == {"a": ["a/1.png"], "b": ["b/2.png", "b/single.png", "b/more/3.png", "b/more/sub/4.png"]}
    links = ["a/loop", "a/other", "a/top", "a/up", "again", "b/more/back", "b/more/self", "b/more2", "b/same.png"]
    links.append("b/twice.png")
    assert names(found, REPEATED) == links
    assert names(found, BROKEN) == ["b/circle.png", "b/gone.png"]
    data = image_folder(root, verify="decode")
    assert data.class_counts == [1, 4]
    assert "2 left out: broken link: " in str(data.summary)


def test_a_link_to_a_hidden_store_is_followed(tmp_path):
    """git-annex and the cache of the Hub keep contents in a hidden folder, under names without an ending."""
    write_png(tmp_path / "data" / ".git" / "annex" / "k1.png", 1)
    write_png(tmp_path / "data" / ".store" / "blob.png", 2)
    (tmp_path / "data" / ".store" / "blob.png").rename(tmp_path / "data" / ".store" / "blob")
    for name, target in (("a/1.png", ".git/annex/k1.png"), ("b/2.png", ".store/blob")):
        (tmp_path / "data" / name).parent.mkdir()
        (tmp_path / "data" / name).symlink_to(tmp_path / "data" / target)
    data = image_folder(tmp_path / "data")
    assert [(seen(image), label) for image, label in data] == [(color(1), 0), (color(2), 1)]


def test_every_ending_that_pillow_opens_is_an_image_and_the_others_are_named(tmp_path):
    for ending in (
        ".png",
        ".gif",
        ".jfif",
        ".jp2",
        ".webp",
        ".bmp",
        ".tif",
        ".ppm",
        ".jpe",
        ".tga",
        ".pcx",
        ".ico",
        ".mpo",
    ):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "a" / f"1{ending.upper()}")
    write_png(tmp_path / "b" / "1.png", 1)
    for name in ("1.heic", "2.HEIC", "scan.pdf", "film.mp4", "drawing.eps", "labels.csv", "README"):
        touch(tmp_path / "b" / name)
    data = image_folder(tmp_path, verify="decode")
    assert data.class_counts == [13, 1]
    counts = {reason: len(files) for reason, files in data.summary.left_out.items()}
    assert counts == {
        "HEIC photo; pip install pillow-heif": 2,
        "drawing; convert it": 2,
        "video": 1,
        "not an image ending (.csv)": 1,
        "no file ending": 1,
    }
    assert "2 left out: HEIC photo; pip install pillow-heif: b/1.heic, b/2.HEIC" in str(data.summary)


def test_images_without_an_image_ending_are_noted(tmp_path):
    for name in ("a", "b"):
        write_png(tmp_path / name / "1.png", 1)
    for number in range(3):
        write_png(tmp_path / "x.png", number)
        (tmp_path / "x.png").rename(tmp_path / "a" / f"{number}.jpg_large")
    write_png(tmp_path / "x.png", 1)
    (tmp_path / "x.png").rename(tmp_path / "b" / "4f2a")
    for name in ("b/5c3d", "b/README", "b/notes.txt"):
        touch(tmp_path / name)
    summary = image_folder(tmp_path).summary
    assert {reason: list(files) for reason, files in summary.left_out.items()} == {
        "not an image ending (.jpg_large)": [f"a/{number}.jpg_large" for number in range(3)],
        "no file ending": ["b/4f2a", "b/5c3d", "b/README"],
        "not an image ending (.txt)": ["b/notes.txt"],
    }
    first, second = summary.notes
    assert first.startswith("3 of 3 files that were opened contain images but are left out (not an image ending (.jpg_")
    assert second.startswith("1 of 3 files that were opened contain images but are left out (no file ending)")
    assert "such as b/4f2a: rename them" in second


def test_special_files_are_not_opened(tmp_path):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "link.png").symlink_to("pipe.png")
    found = ClassFolders(tmp_path)
    assert len(found.paths) == 2
    assert names(found, NOT_REGULAR) == ["a/link.png", "a/pipe.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_that_cannot_be_opened_is_named(tmp_path):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    write_png(tmp_path / "b" / "closed" / "2.png", 1)
    (tmp_path / "b" / "closed").chmod(0)
    try:
        data = image_folder(tmp_path)
    finally:
        (tmp_path / "b" / "closed").chmod(0o755)
    assert list(data.summary.left_out[CLOSED]) == ["b/closed"]
    assert "1 folders cannot be opened" in str(data.summary)


def test_a_folder_that_vanishes_or_fails_is_named(tmp_path, monkeypatch):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    found = ClassFolders(tmp_path)
    assert (images(found)["b"], names(found, CLOSED)) == ([], ["b"])


def test_ignored_output_is_not_a_class(tmp_path):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    write_png(tmp_path / "run" / "report" / "plot.png", 1)
    write_png(tmp_path / "b" / "run2" / "plot.png", 1)
    (tmp_path / "b" / "link").symlink_to(tmp_path / "run" / "report")
    (tmp_path / "b" / "plot.png").symlink_to(tmp_path / "run" / "report" / "plot.png")
    for ignore in ([tmp_path / "run", "b/run2"], ["run/", str(tmp_path / "b" / "run2")]):
        data = image_folder(tmp_path, ignore=ignore)
        assert (data.class_names, data.class_counts) == (["a", "b"], [1, 1])
        assert sorted(data.summary.left_out[IGNORED]) == ["b/link", "b/plot.png", "b/run2", "run"]
    for ignore in ("run", tmp_path / "run"):
        assert image_folder(tmp_path, ignore=ignore).class_names == ["a", "b"]


def test_files_in_the_root_are_named(tmp_path):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    write_png(tmp_path / "loose.png", 1)
    touch(tmp_path / "labels.csv")
    summary = image_folder(tmp_path).summary
    assert list(summary.left_out[OUTSIDE]) == ["labels.csv", "loose.png"]
    assert "2 left out: outside the class folders: labels.csv, loose.png" in str(summary)


def test_images_without_class_folders_are_unlabelled(tmp_path):
    write_png(tmp_path / "1.png", 1)
    with pytest.raises(UnlabelledError, match="has no class folder, but 1 files"):
        image_folder(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="has no class folder; .* It contains: 1 hidden or system entry") as caught:
        image_folder(tmp_path)
    assert not isinstance(caught.value, UnlabelledError)


def test_look_alike_class_folders(tmp_path):
    composed, decomposed = (
        unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE}") for form in ("NFC", "NFD")
    )
    for name in ("cat", "Cat", "dog"):
        write_png(tmp_path / "case" / name / "1.png", 1)
    data = image_folder(tmp_path / "case")
    assert data.class_names == ["Cat", "cat", "dog"]
    note = "classes whose names differ only in case, spaces or invisible characters: "
    assert data.summary.notes == (note + "'Cat', 'cat'",)
    for name in (" c", "c ", "c", "c\N{ZERO WIDTH JOINER}", "d"):
        write_png(tmp_path / "spaces" / name / "1.png", 1)
    data = image_folder(tmp_path / "spaces", unreadable="skip")
    assert data.subset(range(len(data))).summary.notes == (note + r"' c', 'c', 'c ', 'c\u200d'",)
    assert "largest class ' c' (1)" in str(data.summary)
    for name in (composed, decomposed):
        write_png(tmp_path / "form" / name / "1.png", 1)
    with pytest.raises(InputError, match=r"look the same .* Unicode form: .*'caf\\xe9'.* Merge them"):
        image_folder(tmp_path / "form")
    # A split that another system wrote is matched in the same form.
    shutil.rmtree(tmp_path / "form" / composed)
    split = image_folder(tmp_path / "form", [composed, "tea"], allow_empty=True)
    assert (split.class_names, split.class_counts) == ([composed, "tea"], [1, 0])
    with pytest.raises(
        InputError, match=r"missing in class_names: \['Cat'\]\. 'Cat' differs from the class 'cat' only"
    ):
        image_folder(tmp_path / "case", ["cat", "dog"])


def test_class_names_may_be_a_mapping(tmp_path):
    write_png(tmp_path / "cat" / "1.png", 1)
    write_png(tmp_path / "dog" / "1.png", 1)
    for names in ({"dog": 0, "cat": 1}, {1: "cat", 0: "dog"}):
        assert image_folder(tmp_path, names).class_names == ["dog", "cat"]
        assert image_folder(tmp_path, names).labels == [1, 0]


def test_empty_class_folders_are_named(tmp_path):
    write_png(tmp_path / "a" / "1.png", 1)
    write_png(tmp_path / "b" / "1.png", 1)
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "junk" / "Thumbs.db")
    with pytest.raises(InputError, match=r"2 of 4 classes have no image; the first is label 2 \('empty'\), .* nothing"):
        image_folder(tmp_path)
    (tmp_path / "empty").rmdir()
    touch(tmp_path / "junk" / "1.heic")
    with pytest.raises(InputError, match=r"'junk'\), .* contains: 1 HEIC photo; pip install pillow-heif, 1 hidden or"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    split = image_folder(tmp_path, ["a", "b", "empty", "junk", "other"], allow_empty=True)
    assert split.summary.empty == ["empty", "junk", "other"]
    text = str(split.summary)
    assert "3 classes without an image: empty, junk, other" in text
    assert "note: class folders without an image: 'empty', 'junk'" in text


def test_folders_of_splits_are_not_classes(tmp_path):
    for name in ("train", "val"):
        write_png(tmp_path / name / "1.png", 1)
    with pytest.raises(InputError, match=r"of which train, val look like splits .* Pass .*/train, or class_names="):
        image_folder(tmp_path)
    assert image_folder(tmp_path, ["train", "val"]).class_counts == [1, 1]
    write_png(tmp_path / "bus" / "1.png", 1)
    data = image_folder(tmp_path)
    assert data.class_names == ["bus", "train", "val"]
    assert "note: class folders with the name of a split: 'train', 'val'" in str(data.summary)
    write_png(tmp_path / "val" / "cat" / "1.png", 1)
    write_png(tmp_path / "val" / "dog" / "1.png", 1)
    assert image_folder(tmp_path).class_counts == [1, 1, 3], "val contains images"
    (tmp_path / "val" / "1.png").unlink()
    with pytest.raises(InputError, match=r"train, val look like splits .* Pass .*/val, or class_names="):
        image_folder(tmp_path)


def test_root_may_be_a_link_or_relative(tmp_path, monkeypatch):
    write_png(tmp_path / "real" / "a" / "1.png", 1)
    write_png(tmp_path / "real" / "b" / "2.png", 2)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "b" / "loop").symlink_to(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "link")
    for root in (tmp_path / "link", ".", "../link/", "./a/.."):
        data = image_folder(root, verify="decode")
        assert data.class_counts == [1, 1]
        assert list(data.summary.left_out[REPEATED]) == ["b/loop"]
