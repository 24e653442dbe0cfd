"""Sections of the model card: preprocessing as code, results with intervals, classes, settings."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from lpt_peft._prompt_content import content_of
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import InputError
from lpt_peft.hub import CardOptions, model_card
from lpt_peft.recipe import PhaseSettings, TrainSettings
from tests.checkpoint.adapters import tiny_adapter
from tests.hub.runs import COUNTS, IMAGES, NAMES, write_run


def section(card, title):
    """The text under a heading."""
    return re.split(r"^## ", card.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text):
    """Cells of the first table, without its header, as a renderer of Markdown reads them."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    found = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<td>(?:<code>)?(.*?)(?:</code>)?</td>", row) for row in found[1:]]


def card_of(folder, *, results=None, **options):
    return model_card(read_prompt_file(folder / "prompts"), "me/x", CardOptions(results=results, **options))


def photo(path):
    """A JPEG or PNG file of 50 x 40 random pixels: rotated by its EXIF tag, or with transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels[..., :3]).save(path, exif=exif, quality=95)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("options", [{}, {"exif": False, "crop_pct": 0.5}, {"background": [200, 10, 30]}])
def test_the_preprocessing_runs_as_printed(tmp_path, monkeypatch, suffix, options):
    card = model_card(content_of(tiny_adapter(), preprocess=options), "me/x")
    (code,) = re.findall(r"```python\n(.*?)```", section(card, "Preprocess images"), re.DOTALL)
    photo(tmp_path / f"x{suffix}").rename(tmp_path / "photo.jpg")  # the content decides how it is read
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    preprocess = {**tiny_adapter().preprocess(), **options}
    image = Image.open("photo.jpg")
    image.load()
    if suffix == ".png":
        canvas = Image.new("RGBA", image.size, (*preprocess.get("background", (255, 255, 255)), 255))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    elif preprocess.get("exif", True):
        image = image.transpose(Image.Transpose.ROTATE_270)
    expected = Compose(
        [
            Resize(int(32 / preprocess["crop_pct"]), InterpolationMode.BICUBIC),
            CenterCrop(32),
            ToTensor(),
            Normalize(preprocess["mean"], preprocess["std"]),
        ]
    )(image)
    assert names["images"].shape == (1, 3, 32, 32)
    assert torch.equal(names["images"][0], expected)


def test_preprocessing_without_a_transform_is_described_in_words():
    content = content_of(tiny_adapter())
    for changed in ({"mean": (0.5,), "std": (0.2,), "input_size": (1, 32, 32)}, {"interpolation": "`<b>\n```"}):
        card = model_card(replace(content, preprocess={**content.preprocess, **changed}), "me/x")
        text = section(card, "Preprocess images")
        assert "```" not in text
        assert "has no transform for them" in text
        assert str(list(changed.get("mean", content.preprocess["mean"]))) in text


def test_names_of_the_preprocessing_stay_inside_the_code():
    content = content_of(tiny_adapter())
    name = 'x"\n```\n<script>\u202e'
    card = model_card(replace(content, preprocess={**content.preprocess, "crop_mode": name}), "me/x")
    (code,) = re.findall(r"^```python\n(.*?)^```", section(card, "Preprocess images"), re.DOTALL | re.MULTILINE)
    names = {"open_image": None}
    exec(code.rpartition("\n}\n")[0] + "\n}", names)
    assert names["preprocess"]["crop_mode"] == name
    assert "\u202e" not in card


def test_results_have_intervals_and_calibration(tmp_path):
    results = write_run(tmp_path)
    text = section(card_of(tmp_path, results=results), "Results")
    assert "| accuracy on the test split | % | 95 % interval | calibration error in % |" in text
    found = {row[0]: row[1:] for row in rows(text)}
    assert list(found) == ["many", "medium", "few", "overall"]
    for shot, cells in found.items():
        low, high = (100 * bound for bound in results["test"]["intervals"][shot])
        accuracy, error = 100 * results["test"][shot], 100 * results["test"]["calibration_error"][shot]
        assert cells == [f"{accuracy:.1f}", f"{low:.1f} to {high:.1f}", f"{error:.1f}"]
        assert low < accuracy < high
    assert f"{7 * IMAGES} images." in text
    assert "no correct prediction: 1 of 7." in text
    assert "95 %" not in section(card_of(tmp_path), "Results")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda results: results.pop("test"), "lack the split"),
        (lambda results: results["test"].pop("intervals"), "incomplete or were changed: test.intervals"),
        (lambda results: results["test"].update(classes=[1]), r"test.classes\[0\]"),
        (lambda results: results["test"]["classes"][0].update(accuracy=2), r"classes\[0\].accuracy=2 must be from 0"),
        (lambda results: results["test"]["classes"][0].pop("shot"), r"classes\[0\].shot"),
        (lambda results: results["test"].update(few=0.123), "describe other prompts"),
        (lambda results: results["test"]["classes"].pop(), "describe other prompts"),
        (lambda results: results["test"]["classes"][0].update(name="x"), "describe other prompts"),
    ],
)
def test_results_of_other_prompts_are_refused(tmp_path, change, reason):
    results = write_run(tmp_path)
    change(results)
    with pytest.raises(InputError, match=f"cannot be used: .*{reason}.*Give the results.json"):
        card_of(tmp_path, results=results)


def test_results_may_have_more_keys(tmp_path):
    results = write_run(tmp_path)
    expected = card_of(tmp_path, results=results)
    results["test"]["classes"][0]["later"] = results["test"]["later"] = 1
    assert card_of(tmp_path, results=results) == expected


def test_classes_are_listed_from_frequent_to_rare(tmp_path):
    results = write_run(tmp_path)
    text = section(card_of(tmp_path, results=results), "Classes")
    assert f"7 classes with {sum(COUNTS)} training images, from 2 to 300 in a class." in text
    order = sorted(range(7), key=lambda label: -COUNTS[label])
    by_label = results["test"]["classes"]
    for label, cells in zip(order, rows(text), strict=True):
        row = by_label[label]
        assert cells[:4] == [str(label), NAMES[label], str(COUNTS[label]), f"{100 * row['accuracy']:.1f}"]
        assert cells[4:] == [f"{100 * row['low']:.1f} to {100 * row['high']:.1f}", str(IMAGES)]
    assert [row[:3] for row in rows(text)] == rows(section(card_of(tmp_path), "Classes"))


def test_a_class_without_images_has_no_accuracy(tmp_path):
    results = write_run(tmp_path)
    results["test"]["classes"][6] |= {"images": 0, "correct": 0, "accuracy": None, "low": None, "high": None}
    assert rows(section(card_of(tmp_path, results=results), "Classes"))[-1][3:] == ["-", "-", "0"]


def card_with(metadata, classes):
    content = content_of(tiny_adapter())
    return model_card(replace(content, metadata=metadata, config=replace(content.config, num_classes=classes)), "me/x")


def test_of_thousands_of_classes_the_most_frequent_and_the_rarest_are_listed():
    counts = tuple(range(1, 5001))
    names = tuple(f"class {label} {'x' * 500}" for label in range(5000))
    card = card_with(PromptMetadata(class_counts=counts, label_names=names), 5000)
    text = section(card, "Classes")
    assert "5,000 classes with 12,502,500 training images, from 1 to 5,000 in a class." in text
    assert "the 10 most frequent and the 10 rarest" in text
    labels = [row[0] for row in rows(text)]
    expected = [*range(4999, 4989, -1), "…", *range(9, -1, -1)]
    assert labels == [str(label) for label in expected]
    assert max(len(row[1]) for row in rows(text)) == 60
    assert len(card) < 8000
    unknown = section(card_with(PromptMetadata(label_names=names), 5000), "Classes")
    assert "5,000 classes, of which the table shows the first 10 and the last 10." in unknown
    assert [row[0] for row in rows(unknown)][-1] == "4999"


def test_classes_without_names_or_counts():
    assert rows(section(card_with(PromptMetadata(class_counts=(3, 9)), 2), "Classes")) == [["1", "9"], ["0", "3"]]
    assert rows(section(card_with(PromptMetadata(label_names=("a", "b")), 2), "Classes")) == [["0", "a"], ["1", "b"]]
    assert "## Classes" not in card_with(PromptMetadata(), 2)


def test_class_names_stay_text():
    names = ("a|b", "`x`", "<img src=x onerror=1>", "[a](b)", "**bold**\\", "\u202eevil", " ", "```\u2028# x")
    card = card_with(PromptMetadata(label_names=names), len(names))
    found = [row[1] for row in rows(section(card, "Classes"))]
    assert found == ["a b", "x", "&lt;img src=x onerror=1&gt;", "[a](b)", "**bold**\\", "evil", " ", "# x"]
    html = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert not re.search(r"<img|<strong>|href=\"b", html)
    assert html.count("<h1>") == 1


def test_settings_are_a_table_without_defaults(tmp_path):
    settings = TrainSettings(loss="logit_adjusted", sampling="instance", shared=PhaseSettings(epochs=3, momentum=0.5))
    write_run(tmp_path, settings=settings)
    text = section(card_of(tmp_path, default_recipe=TrainSettings().to_dict()), "Recipe")
    assert "| setting | value | default |" in text
    found = {row[0]: row[1:] for row in rows(text)}
    assert found["shared.momentum"] == ["0.5", "0.9"]
    assert found["shared.epochs"] == ["3", "40"]
    assert found["loss"] == ["logit_adjusted", "lpt"]
    assert found["seed"] == ["0", "0"]  # always stated
    assert "group.momentum" not in found
    plain = settings.to_dict()
    total = sum(len(value) if isinstance(value, dict) else 1 for value in plain.values())
    total -= len(plain["group"]) - 1  # phase "joint" uses the rate of the group prompts only
    assert f"The other {total - len(found)} settings have the defaults of lpt_peft" in text
    every = section(card_of(tmp_path), "Recipe")
    assert len(rows(every)) == total
    assert "defaults" not in every


def test_a_setting_that_is_no_default_is_shown():
    recipe = {"a": True, "b": 1, "c": {}, "d": {"e": None}, "new": 0}
    card = model_card(
        content_of(tiny_adapter(), training={"recipe": recipe}),
        "me/x",
        CardOptions(default_recipe={"a": 1, "b": 1.0, "c": {}, "d": {"e": 0}}),
    )
    assert rows(section(card, "Recipe")) == [["a", "True", "1"], ["d.e", "None", "0"], ["new", "0", "-"]]


def test_a_long_recipe_is_cut():
    card = model_card(content_of(tiny_adapter(), training={"recipe": {f"s{n:03}": n for n in range(130)}}), "me/x")
    assert len(rows(section(card, "Recipe"))) == 100
    assert "30 more settings are in the prompt file." in section(card, "Recipe")


def test_method_placement_router_and_temperature_are_stated():
    content = content_of(tiny_adapter(), training={"recipe": {"method": "vpt_deep"}})
    card = model_card(replace(content, metadata=replace(content.metadata, temperature=1.2345678)), "me/x")
    assert "trained by the method `vpt_deep` with" in card
    assert "Long-tailed Prompt Tuning" not in card
    contents = section(card, "Contents")
    for text in ("- method: `vpt_deep`", "- placement: deep", "query final", "- router: none", "logits by 1.235 "):
        assert text in contents, text
    config = replace(content.config, placement="shallow")
    tensors = {name: content.tensors[name] for name in ("shared.prompts", "head.weight")}
    shallow = model_card(replace(content, config=config, tensors=tensors, phase="shared"), "me/x")
    assert "- placement: shallow" in shallow
    assert "router" not in shallow
    assert "temperature" not in shallow


def test_pictures_are_linked_relative_to_the_card():
    card = model_card(content_of(tiny_adapter()), "me/x", pictures=("a (b)/ü]/accuracy.png", "other.png"))
    assert "(a%20%28b%29/%C3%BC%5D/accuracy.png)" in section(card, "Results")
    assert "![other.png](other.png)" in section(card, "Results")
    html = MarkdownIt("commonmark").render(section(card, "Results"))
    assert re.findall('src="(.*?)"', html) == ["a%20%28b%29/%C3%BC%5D/accuracy.png", "other.png"]
    assert "training images" in json.dumps(re.findall('alt="(.*?)"', html))
