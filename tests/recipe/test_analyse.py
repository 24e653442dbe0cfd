"""analyse against separate passes in each state, and against the selection replaced by hooks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter
from lpt_peft.analysis import accuracy_of, blur, knn_predict, reliability, separability
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.recipe import TrainSettings, make_accelerator
from lpt_peft.recipe.analyse import AnalysedImages, analyse, write_analysis
from lpt_peft.recipe.analyse.sections import plain
from lpt_peft.recipe.analyse.subsets import stratified_indices
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit

COUNTS = [20, 8, 3]
NAMES = ["ant", "bee", "cat"]
SETTINGS = TrainSettings(num_workers=0)


class Tensors:
    """Image source of tensors."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, position):
        return self.images[position]

    def name(self, position):
        return f"image {position}"

    def path(self, position):
        return None


class Raw(LabelledImages):
    """Tensors instead of pictures, not converted."""

    def __getitem__(self, index):
        return self.images.read(index), self.labels[index]

    def subset(self, indices, *, allow_empty=False):
        labels = [self.labels[index] for index in indices]
        return Raw(Tensors(self.images.images[list(indices)]), labels, self.class_names, allow_empty=True)


def images_of(labels, seed):
    """Noise with a stripe whose position depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.randn(len(labels), 3, 32, 32, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 1
    return Raw(Tensors(images), labels, NAMES, allow_empty=True)


TRAIN = images_of([0] * 20 + [1] * 8 + [2] * 3, 0)
TEST = images_of([0, 1, 2] * 10, 1)
VALIDATION = images_of([0, 1, 2] * 5, 2)


def trained(query="final", phase="group"):
    adapter = LongTailPromptAdapter.wrap(tiny_vit(depth=3), 3, prompt_length=3, pool_size=5, top_k=2, query=query)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (adapter.shared.prompts, adapter.pool.prompts):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapter.eval()
        adapter.pool.init_keys(adapter.queries(TRAIN.images.images))
        features = adapter.features(TRAIN.images.images)
        labels = torch.tensor(TRAIN.labels)
        adapter.head.weight.copy_(torch.stack([features[labels == label].mean(0) for label in range(3)]))
    adapter.phase = phase
    return adapter


def run(model, **options):
    given = AnalysedImages(TEST, "test", "data", train=TRAIN, validation=VALIDATION)
    images = options.pop("images", given)
    result = analyse(
        model, images, class_names=NAMES, class_counts=COUNTS, settings=SETTINGS, progress=False, **options
    )
    json.dumps(result, allow_nan=False)
    return result


@pytest.mark.parametrize("query", ["final", "block_k"])
def test_features_are_those_of_separate_passes(query):
    adapter = trained(query)
    section = run(adapter)["features"]
    assert list(section) == ["plain", "shared", "group"]
    assert adapter.phase == "group"
    vit = adapter.vit

    def features(state, images):
        if state == "plain":
            with adapter.disable_adapter():
                return vit.forward_head(vit.forward_features(images), pre_logits=True)
        adapter.phase = state
        return adapter.features(images)

    target = torch.tensor(TEST.labels)
    for state, row in section.items():
        with torch.no_grad():
            test, train = features(state, TEST.images.images), features(state, TRAIN.images.images)
        for k in (1, 20):
            predicted = knn_predict(train, TRAIN.labels, test, k=[k])[k]
            assert row[f"knn_{k}"]["accuracy"] == pytest.approx(accuracy_of(predicted, target, 3).accuracy, abs=1e-6)
        assert row["gamma"] == pytest.approx(separability(test, target, 3).gamma, rel=1e-4)


def test_pool_rows_are_those_of_replaced_selections():
    adapter = trained()
    pool = run(adapter)["pool"]
    images, target = TEST.images.images, torch.tensor(TEST.labels)

    def accuracy(prompts):
        """Balanced accuracy if the pool returns these prompts for all images."""

        def replace(module, args, match):
            return match._replace(prompts=prompts.expand_as(match.prompts))

        handle = adapter.pool.register_forward_hook(replace)
        with torch.no_grad():
            predicted = adapter(images).argmax(1)
        handle.remove()
        return accuracy_of(predicted, target, 3)

    with torch.no_grad():
        prompts = adapter.pool.prompts
        chosen = accuracy_of(adapter(images).argmax(1), target, 3)
        averaged, fixed = accuracy(prompts.mean(0)), [accuracy(group) for group in prompts]
        adapter.phase = "shared"
        none = accuracy_of(adapter(images).argmax(1), target, 3)
    expected = {"chosen": chosen, "averaged": averaged, "none": none}
    for name, row in expected.items():
        assert pool["rows"][name] == plain(dict(zip(("accuracy", "balanced_accuracy"), row[:2], strict=True))), name
    best = [max(float(row.per_class[label]) for row in fixed) for label in range(3)]
    assert pool["rows"]["oracle"]["balanced_accuracy"] == pytest.approx(sum(best) / 3, abs=1e-6)
    assert pool["rows"]["fixed"]["balanced_accuracy"] == pytest.approx(
        max(row.balanced_accuracy for row in fixed), abs=1e-6
    )
    gain = pool["chosen_minus"]["none"]["estimate"]
    assert gain == pytest.approx(chosen.balanced_accuracy - none.balanced_accuracy, abs=1e-6)
    assert len({row["balanced_accuracy"] for row in pool["rows"].values()}) > 1  # the groups make a difference here


def test_blur_is_applied_to_pixels_and_the_temperature_is_that_of_the_validation_images():
    adapter = trained()
    result = run(adapter)
    blurred = next(row for row in result["shift"] if row["name"] == "blur")
    with torch.no_grad():
        # Blurring commutes with the normalization.
        predicted = adapter(blur(TEST.images.images, blurred["strength"])).argmax(1)
    expected = accuracy_of(predicted, torch.tensor(TEST.labels), 3).balanced_accuracy
    assert blurred["shifted"] == pytest.approx(expected, abs=1e-6)
    temperature = result["calibration"]["temperature"]
    value = temperature["value"]
    assert temperature["source"] == "validation"
    with torch.no_grad():
        logits = adapter(VALIDATION.images.images).double()
    target = torch.tensor(VALIDATION.labels)

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(logits / temperature, target))

    assert loss(value) < min(loss(1.02 * value), loss(0.98 * value))


def test_a_stored_temperature_is_used_without_a_pass_over_the_validation_images():
    adapter = trained()
    fitted = run(adapter)["calibration"]
    adapter.metadata = replace(adapter.metadata, temperature=2.5)
    validation = Unreadable([None] * 3, [0, 1, 2], NAMES)  # reading an image is an error
    images = AnalysedImages(TEST, "test", "data", train=TRAIN, validation=validation)
    stored = run(adapter, images=images)["calibration"]
    with torch.no_grad():
        logits, target = adapter(TEST.images.images).double(), torch.tensor(TEST.labels)
    for temperature in (stored["temperature"], fitted["temperature"]):
        for name, divisor in (("loss_before", 1.0), ("loss_after", temperature["value"])):
            expected = float(torch.nn.functional.cross_entropy(logits / divisor, target))
            assert temperature[name] == pytest.approx(expected, abs=2e-6)
    assert (stored["temperature"]["value"], stored["temperature"]["source"]) == (2.5, "file")
    assert stored["before"] == fitted["before"]
    probability = (logits / 2.5).softmax(1).amax(1).float()
    correct = logits.argmax(1) == target
    expected = reliability(probability, correct)
    assert stored["after"]["overall"]["error"] == pytest.approx(expected.error, abs=1e-6)


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("validation", "fitted on the validation images, which are the evaluated images here"),
        ("test", "the model's file has none, and there is no validation split to fit it on"),
    ],
)
def test_the_reason_for_a_missing_temperature(split, reason):
    adapter = trained()
    if split == "validation":
        adapter.metadata = replace(adapter.metadata, temperature=2.5)
    result = run(adapter, images=AnalysedImages(TEST, split, "data", train=TRAIN))
    assert reason in result["left_out"]["temperature"]
    assert result["calibration"]["temperature"] is None
    assert result["calibration"]["after"] is None


@pytest.mark.parametrize(("method", "states"), [("linear_probe", ["plain"]), ("full", ["tuned"])])
def test_models_without_prompts(method, states, tmp_path):
    model = ViTClassifier.wrap(tiny_vit(depth=2), 3, method=method).eval()
    result = run(model)
    assert list(result["features"]) == states
    assert {"matching", "pool"} <= set(result["left_out"])
    assert ("plain" in result["left_out"]) == (method == "full")
    names = {path.name for path in write_analysis(result, tmp_path / "analysis")}
    assert names >= {"analysis.json", "features.png", "calibration.png"}
    assert "matching.png" not in names


def test_prompts_before_the_first_block():
    adapter = LongTailPromptAdapter.wrap(tiny_vit(depth=2), 3, prompt_length=3, placement="shallow").eval()
    result = run(adapter)
    assert list(result["features"]) == ["plain", "shared"]
    with torch.no_grad():
        features = adapter.features(TEST.images.images)
    expected = separability(features, TEST.labels, 3).gamma
    assert result["features"]["shared"]["gamma"] == pytest.approx(expected, rel=1e-4)
    assert result["features"]["plain"]["gamma"] != pytest.approx(expected, rel=1e-4)


def test_validation_that_is_classified_perfectly_gives_no_temperature():
    adapter = trained()
    with torch.no_grad():
        predicted = adapter(TEST.images.images).argmax(1).tolist()
    perfect = Raw(TEST.images, predicted, NAMES, allow_empty=True)
    images = AnalysedImages(TEST, "test", "data", train=TRAIN, validation=perfect)
    result = run(adapter, images=images)
    assert result["calibration"]["temperature"] is None
    assert result["calibration"]["after"] is None
    assert "correctly with such a margin" in result["left_out"]["temperature"]


def test_numbers_of_images_are_checked():
    for name in ("max_images", "max_variant_images"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            run(trained(), **{name: 0})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_subsets_keep_rare_classes(labels, most):
    indices = stratified_indices(labels, most)
    assert indices == sorted(set(indices))
    assert len(indices) <= most
    if len(labels) <= most:
        assert len(indices) == len(labels)
        return
    kept = [sum(labels[index] == label for index in indices) for label in range(6)]
    counts = [labels.count(label) for label in range(6)]
    present = sum(count > 0 for count in counts)
    if present > most:
        assert max(kept) == 1
        assert len(indices) == most
        return
    cap = max(kept)
    assert kept == [min(count, cap) for count in counts]
    assert sum(min(count, cap + 1) for count in counts) > most  # no larger cap fits


def test_nan_becomes_none_and_fractions_are_rounded():
    value = {"a": torch.tensor([math.nan, 1 / 3]), "b": (1, math.inf), "c": None, "d": "x"}
    assert plain(value) == {"a": [None, 0.333333], "b": [1, None], "c": None, "d": "x"}


def test_images_that_all_cannot_be_read_are_an_error():
    images = AnalysedImages(Unreadable([None] * 3, [0, 1, 2], NAMES), "test", "data")
    adapter, accelerator = trained(), make_accelerator(SETTINGS)
    with pytest.raises(InputError, match="none of the images can be read"):
        run(adapter, images=images, accelerator=accelerator)


class Unreadable(Raw):
    """Images that all cannot be read."""

    def __init__(self, images, labels, names, **options):
        super().__init__(Tensors(images), labels, names, allow_empty=True, unreadable="skip")
        self.unreadable_images.add(range(len(labels)), "unreadable")

    def __getitem__(self, index):
        raise InputError("unreadable")
