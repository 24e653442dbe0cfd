"""Build the Emoji-LT data set from unpacked npm packages: a real long tail of drawn pictures.

A class is a Unicode subgroup ("food-vegetable"); an image is an emoji in a drawing style, square, on white. The images
are split by emoji: all drawings of an emoji are in the same split. A style is kept out of training, and its drawings of
test emoji are the test of domain shift. With the versions below: 89 classes, 4,690 training images (434 down to 10 of
a class), 840 for validation, 1,322 for testing and 336 in the style kept out.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 openmoji@17.0.0 fluentui-emoji@1.3.0
    for f in *.tgz; do
        mkdir "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}" --strip-components 1
    done
    pip install resvg-py pillow
    python build.py --google emoji-datasource-google-16.0.0 --twitter emoji-datasource-twitter-16.0.0 \
        --openmoji openmoji-17.0.0 --fluent fluentui-emoji-1.3.0 --output emoji_lt

The output has class folders in `train/`, `validation/`, `test/` and `shift/` (test emoji in the style kept out), and
`summary.json`. The licences of the drawings are those of their packages and apply to the images: Noto (google)
Apache-2.0 and OFL, Twemoji (twitter) CC-BY 4.0, OpenMoji CC-BY-SA 4.0, Fluent MIT. Publish no images without them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

STYLES = ("google", "twitter", "openmoji", "fluent_flat", "fluent_modern")
MIN_EMOJI = 5  # a class with fewer is left out
TEST_IMAGES = 20  # of a class, at most half of its emoji
VALIDATION_SHARE = 0.15


def slug(name: str) -> str:
    """Return the name of a Fluent icon's file: lower case, ASCII, words joined by hyphens."""
    ascii_name = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")


class Sources:
    """Finds the drawings of an emoji, by code points or by name."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self.packages = packages
        self.emoji = json.loads((packages["google"] / "emoji.json").read_text(encoding="utf-8"))
        listed = json.loads((packages["openmoji"] / "data" / "openmoji.json").read_text(encoding="utf-8"))
        self.names = {entry["hexcode"].replace("-FE0F", ""): entry["annotation"] for entry in listed}
        files = sorted((packages["openmoji"] / "src").rglob("*.svg"))
        self.openmoji = {path.stem.replace("-FE0F", ""): path for path in files}

    def path(self, entry: dict[str, str], style: str) -> Path | None:
        """Return the file of an emoji in a style; None if the package has no such drawing."""
        code = entry["unified"].replace("-FE0F", "")
        if style in ("google", "twitter"):
            path = self.packages[style] / "img" / style / "64" / entry["image"]
            return path if path.is_file() else None
        if style == "openmoji":
            return self.openmoji.get(code)
        if code not in self.names:
            return None
        folder = self.packages["fluent"] / "icons" / style.removeprefix("fluent_")
        found = (folder / f"{slug(self.names[code])}{ending}.svg" for ending in ("", "-default"))
        return next((path for path in found if path.is_file()), None)


def draw(path: Path, size: int) -> Image.Image:
    """Draw an emoji on white, RGB, centred in a square of `size` pixels."""
    if path.suffix == ".svg":
        import resvg_py  # noqa: PLC0415 - only for SVG

        picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * size))))
    else:
        picture = Image.open(path)
    picture = picture.convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    if max(picture.size) < size:
        scale = size / max(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square.convert("RGB")


def split_of_emoji(entries: list[dict[str, str]], generator: np.random.Generator, styles: int) -> dict[str, str]:
    """Choose the split of each emoji of a class: about 20 test images, at most half of the emoji; then validation."""
    order = [entries[index]["unified"] for index in generator.permutation(len(entries))]
    test = min(max(1, round(TEST_IMAGES / styles)), len(order) // 2)
    validation = min(round(VALIDATION_SHARE * (len(order) - test)), len(order) - test - 1)
    return {
        code: "test" if index < test else "validation" if index < test + validation else "train"
        for index, code in enumerate(order)
    }


def images(sources: Sources, shift_style: str, seed: int) -> Iterator[tuple[str, str, str, str, Path]]:
    """Yield all images as (split, class, emoji, style, file)."""
    classes: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in sorted(sources.emoji, key=lambda entry: entry["unified"]):
        if entry["category"] != "Component" and any(sources.path(entry, style) for style in STYLES):
            classes[entry["subcategory"]].append(entry)
    generator = np.random.default_rng(seed)
    for name in sorted(classes):
        if len(classes[name]) < MIN_EMOJI:
            print(f"Left out: class {name}, {len(classes[name])} emoji (at least {MIN_EMOJI}).", file=sys.stderr)
            continue
        splits = split_of_emoji(classes[name], generator, len(STYLES))
        for entry in classes[name]:
            for style in STYLES:
                split = splits[entry["unified"]]
                if style == shift_style:
                    split = "shift" if split == "test" else ""
                if split and (path := sources.path(entry, style)):
                    yield split, name, entry["unified"], style, path


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the images and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("google", "twitter", "openmoji", "fluent"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of the unpacked npm package")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112, help="pixels of a side")
    parser.add_argument("--quality", type=int, default=85, help="of the JPEG files")
    parser.add_argument("--shift-style", choices=STYLES, default="openmoji", help="never trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args(arguments)
    packages = {name: getattr(options, name) for name in ("google", "twitter", "openmoji", "fluent")}
    for name, folder in packages.items():
        if not (folder / "package.json").is_file():
            parser.error(f"--{name} {folder} has no package.json: give the folder of the unpacked npm package.")
    if options.output.exists():
        parser.error(f"--output {options.output} exists already: give a new folder, or remove it first.")
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts: Counter[tuple[str, str]] = Counter()
    for split, name, code, style, path in images(Sources(packages), options.shift_style, options.seed):
        target = partial / split / name / f"{code}-{style}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(path, options.size).save(target, quality=options.quality, optimize=True)
        counts[split, name] += 1
        if sum(counts.values()) % 1000 == 0:
            print(f"{sum(counts.values())} images", file=sys.stderr)
    summary = {split: {n: c for (s, n), c in sorted(counts.items()) if s == split} for split, _ in sorted(counts)}
    (partial / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(options.output)
    for split, classes in summary.items():
        sizes = sorted(classes.values())
        print(f"{split}: {sum(sizes)} images, {len(sizes)} classes, {sizes[0]} to {sizes[-1]} images")


if __name__ == "__main__":
    main()
