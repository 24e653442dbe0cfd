"""examples/benchmarks/emoji_lt/build.py on small packages of the same form as the npm packages."""

from __future__ import annotations

import json
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "emoji_lt" / "build.py"
CLASSES = {"animal-mammal": 12, "food-vegetable": 6, "currency": 2, "skin-tone": 9}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="{}"/></svg>'


@pytest.fixture
def main():
    pytest.importorskip("resvg_py", reason="draws the SVG files")
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def packages(tmp_path):
    names = ("google", "twitter", "openmoji", "fluent")
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "package.json").write_text("{}")
        for inner in (f"img/{name}/64", "data", "src/x", "icons/flat", "icons/modern"):
            (folder / inner).mkdir(parents=True)
    entries, names = [], []
    for subgroup, count in CLASSES.items():
        category = "Component" if subgroup == "skin-tone" else "Other"
        for number in range(count):
            code, name = f"1F{len(entries):03X}", f"{subgroup} no. {number}"
            entries.append(
                {"unified": f"{code}-FE0F", "image": f"{code}.png", "category": category, "subcategory": subgroup}
            )
            names.append({"hexcode": code, "annotation": name})
            for style in ("google", "twitter"):
                picture = Image.new("RGBA", (64, 32), (255, 0, 0, 255))
                picture.save(folders[style] / "img" / style / "64" / f"{code}.png")
            (folders["openmoji"] / "src" / "x" / f"{code}.svg").write_text(SVG.format("green"))
            ending = "-default" if number % 2 else ""
            (folders["fluent"] / "icons" / "flat" / f"{subgroup}-no-{number}{ending}.svg").write_text(
                SVG.format("blue")
            )
    (folders["google"] / "emoji.json").write_text(json.dumps(entries))
    (folders["openmoji"] / "data" / "openmoji.json").write_text(json.dumps(names))
    return [argument for name, folder in folders.items() for argument in (f"--{name}", str(folder))]


def emoji_by_split(output):
    found = defaultdict(set)
    for path in output.rglob("*.jpg"):
        found[path.parts[-3], path.parts[-2]].add(path.name.split("-")[0])
    return found


def test_splits_by_emoji(main, packages, tmp_path, capsys):
    output = tmp_path / "out"
    main([*packages, "--output", str(output), "--size", "32"])
    found = emoji_by_split(output)
    assert {name for _, name in found} == {"animal-mammal", "food-vegetable"}
    assert "class currency, 2 emoji" in capsys.readouterr().err
    for name, count in (("animal-mammal", 12), ("food-vegetable", 6)):
        train, validation, test, shift = (found[split, name] for split in ("train", "validation", "test", "shift"))
        assert len(train | validation | test) == count == len(train) + len(validation) + len(test)
        assert test == shift
        assert len(test) == min(4, count // 2)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["train"] == {name: 3 * len(found["train", name]) for name in summary["train"]}
    assert all(path.name.endswith("-openmoji.jpg") for path in (output / "shift").rglob("*.jpg"))
    assert not list((output / "train").rglob("*-openmoji.jpg"))


def test_pictures_are_square_and_on_white(main, packages, tmp_path):
    output = tmp_path / "out"
    main([*packages, "--output", str(output), "--size", "32", "--quality", "100"])
    with Image.open(next(iter((output / "train").rglob("*-google.jpg")))) as picture:  # 64 x 32 pixels in the package
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        assert min(picture.getpixel((16, 1))) > 250
        red, green, blue = picture.getpixel((16, 16))
        assert red > 240
        assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "out").mkdir(), "out exists already: give a new folder"),
        (lambda folder: (folder / "twitter" / "package.json").unlink(), "twitter has no package.json"),
    ],
)
def test_refusals(main, packages, tmp_path, capsys, change, words):
    change(tmp_path)
    with pytest.raises(SystemExit):
        main([*packages, "--output", str(tmp_path / "out")])
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_the_same_seed_gives_the_same_splits(main, packages, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main([*packages, "--output", str(tmp_path / name), "--size", "16", "--seed", str(seed)])
        found.append(emoji_by_split(tmp_path / name))
    assert found[0] == found[1] != found[2]
