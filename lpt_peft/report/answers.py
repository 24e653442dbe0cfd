"""Sentences of the first screen: what a newcomer asks about a run, answered with numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lpt_peft.metrics.shot_rules import SHOT_NAMES
from lpt_peft.report.classes import clip, count, percent, points, with_interval

_STATES = {"plain": "the plain ViT", "shared": "the shared prompt", "group": "the trained model with groups"}
_Z = 1.96
_TRUSTED = 0.05
_NAMED = 5
_ROUNDED = 0.0005  # of numbers with one decimal in percent


class Answer(NamedTuple):
    """A question and its answer."""

    question: str
    verdict: str
    """A few words."""
    text: str
    """Sentences with the numbers behind it."""


def answers(analysis: Mapping[str, Any]) -> list[Answer]:
    """Answer the questions of the first screen.

    Args:
        analysis: See `lpt_peft.recipe.analyse.analyse`.
    """
    return [
        _accuracy(analysis),
        _failing(analysis),
        _tail(analysis),
        _prompts(analysis),
        _groups(analysis),
        _probabilities(analysis),
    ]


def _accuracy(analysis: Mapping[str, Any]) -> Answer:
    question, classes, data = "How accurate is it?", analysis["classes"], analysis["data"]
    overall, total = analysis["accuracy"]["overall"], sum(classes["images"])
    if overall is None or not total:
        return Answer(question, "Not measured", "No image was evaluated.")
    text = (
        f"Mean over {count(_measured(classes), 'class')}, on {total:,} images of the {data['split']} split; "
        f"{percent(sum(classes['correct']) / total)} of these images are right. The model was trained on "
        f"{sum(classes['train_images']):,} images."
    )
    return Answer(question, with_interval(overall), text)


def _failing(analysis: Mapping[str, Any]) -> Answer:
    question, classes, never = "Which classes fail?", analysis["classes"], analysis["weak"]["never_right"]
    weakest = _weakest(classes)
    if not weakest:
        return Answer(question, "None", "All evaluated images are classified correctly.")
    named = ", ".join(f"{_name(classes, label)} ({percent(classes['accuracy'][label])})" for label in weakest)
    verdict = f"Weakest: {_name(classes, weakest[0])}"
    if never:
        verb = "is" if len(never) == 1 else "are"
        verdict = f"{len(never):,} of {count(_measured(classes), 'class')} {verb} never right"
    text = f"Weakest: {named}."
    if len(analysis["weak"]["worst"]) > len(weakest):
        share, mean = percent(analysis["weak"]["share"]), percent(analysis["weak"]["worst_accuracy"])
        text += f" The weakest {share} of the classes reach {mean}."
    if analysis["confused_pairs"]:
        pair = analysis["confused_pairs"][0]
        text += (
            f" Most confused: {_name(classes, pair['target'])}, classified as {_name(classes, pair['prediction'])} in "
            f"{pair['images']:,} of {count(classes['images'][pair['target']], 'image')}."
        )
    return Answer(question, verdict, text)


def _tail(analysis: Mapping[str, Any]) -> Answer:
    question, accuracy, classes = "Is it the tail?", analysis["accuracy"], analysis["classes"]
    groups = [shot for shot in SHOT_NAMES if accuracy[shot] is not None]
    text = "; ".join(f"{shot}-shot classes {with_interval(accuracy[shot])}" for shot in groups) + "."
    text = text[:1].upper() + text[1:]
    weakest = max(_weakest(classes), analysis["weak"]["worst"], key=len)
    if len(weakest) > 1:
        rare = sum(classes["shots"][label] == groups[-1] for label in weakest)
        text += f" Of the {len(weakest):,} weakest classes, {rare:,} {'is' if rare == 1 else 'are'} {groups[-1]}-shot."
    if len(groups) < 2:
        return Answer(question, "Cannot be compared", f"All evaluated classes are {''.join(groups)}-shot. {text}")
    frequent, rare_group = accuracy[groups[0]], accuracy[groups[-1]]
    difference = frequent["estimate"] - rare_group["estimate"]
    if rare_group["high"] < frequent["low"]:
        verdict = f"Yes: {groups[-1]}-shot classes are {points(difference, sign=False)} below {groups[0]}-shot classes"
    elif rare_group["low"] > frequent["high"]:
        verdict = f"No: {groups[-1]}-shot classes are {points(-difference, sign=False)} above {groups[0]}-shot classes"
    else:
        verdict = "Not clearly: the intervals overlap"
    return Answer(question, verdict, text)


def _prompts(analysis: Mapping[str, Any]) -> Answer:
    question, features = "Did the prompts help?", analysis.get("features", {})
    found = {
        state: row["knn_1"]["balanced_accuracy"]
        for state, row in features.items()
        if row.get("knn_1") and row["knn_1"]["balanced_accuracy"] is not None
    }
    method = analysis["model"]["method"]
    if method in ("linear_probe", "full"):
        trained = "only the classifier is trained" if method == "linear_probe" else "all weights of the ViT are trained"
        text = f"With the method {method}, {trained}."
        if found:
            state, value = next(iter(found.items()))
            named = "the plain ViT" if state == "plain" else "the tuned ViT"
            text += (
                f" In the features of {named}, the nearest training image has the correct class for {percent(value)} "
            )
            text += "of the images (mean over classes)."
        return Answer(question, "No prompts", text)
    if "plain" not in found or len(found) < 2:
        return Answer(question, "Not measured", f"Features were not compared: {_reason(analysis, 'knn', 'features')}.")
    text = ", ".join(f"{_STATES.get(state, state)} {percent(value)}" for state, value in found.items())
    last = list(found)[-1]
    gain, margin = found[last] - found["plain"], _margin(analysis, min((found["plain"], found[last]), key=_from_half))
    text = (
        f"Accuracy of the nearest training image, mean over classes: {text}. Differences up to about "
        f"{points(margin, sign=False)} can be chance for this number of test images."
    )
    if abs(gain) <= margin:
        return Answer(question, f"Not clearly: {points(gain)}", text)
    return Answer(question, f"{'Yes' if gain > 0 else 'No'}: {points(gain)} over the plain ViT", text)


def _groups(analysis: Mapping[str, Any]) -> Answer:
    question, pool = "Are the groups worth their cost?", analysis.get("pool")
    if pool is None:
        model = analysis["model"]
        if model["groups"] is not None:
            return Answer(question, "Not measured", f"The groups were not compared: {_reason(analysis, 'pool')}.")
        two_phases = model["method"] == "lpt"
        verdict = "Not trained" if two_phases else "Not part of this method"
        text = "The model selects no groups." if two_phases else f"Method {model['method']} has no groups."
        return Answer(question, verdict, f"{text} Train a second run with groups, and report both.")
    gains = pool["chosen_minus"]
    none, random = gains.get("none"), gains.get("random")
    if none is None:
        return Answer(question, "Not measured", "No evaluated image was measured without groups.")
    text = f"Chosen groups minus no groups: {with_interval(none, points)}"
    text += f"; minus random groups: {with_interval(random, points)}." if random else "."
    if none["low"] > 0:
        verdict = f"Yes: {points(none['estimate'])}"
        if random and random["low"] <= 0 <= random["high"]:
            text += " Random groups do about as well, so the choice itself adds little."
    elif none["high"] < 0:
        verdict = f"No: {points(none['estimate'])}"
        text += " Train without groups (--phases shared)."
    else:
        verdict = "No clear gain: the interval contains 0"
        text += " A run without groups (--phases shared) has a smaller file and, with query final, predicts faster."
    return Answer(question, verdict, text)


def _probabilities(analysis: Mapping[str, Any]) -> Answer:
    question, calibration = "Can the probabilities be trusted?", analysis["calibration"]
    overall, few = calibration["before"]["overall"], calibration["before"]["few"]
    images = sum(overall["images"])
    if overall["error"] is None or not images:
        return Answer(question, "Not measured", "No image was evaluated.")
    confidence, accuracy = (_weighted(overall[name], overall["images"]) for name in ("confidence", "accuracy"))
    gap, margin = confidence - accuracy, _Z * math.sqrt(accuracy * (1 - accuracy) / images)
    text = (
        f"The mean probability is {percent(confidence)}, and {percent(accuracy)} of the images are right: a "
        f"difference of {with_interval({'estimate': gap, 'low': gap - margin, 'high': gap + margin}, points)}. "
        f"Mean gap over bins of probability (ECE): {percent(overall['error'])}"
    )
    if few["error"] is not None:
        text += f", few-shot classes {percent(few['error'])}"
    if calibration["after"] is not None:
        after, temperature = calibration["after"]["overall"]["error"], calibration["temperature"]
        source = {"file": "stored with the model", "validation": "fitted on the validation images"}
        text += f"; with the temperature {temperature['value']:.2f} ({source[temperature['source']]}), {percent(after)}"
    kind = "too high" if gap > 0 else "too low"
    worst = max(overall["error"], few["error"] or 0)
    if worst <= _TRUSTED:
        verdict = f"Yes: the gap is at most {percent(worst)}"
    elif overall["error"] <= _TRUSTED:
        verdict = f"Not for few-shot classes: their gap is {percent(few['error'])}"
    else:
        verdict = (
            f"No: on average {points(abs(gap), sign=False)} {kind}" if abs(gap) > margin else "No: the bins are off"
        )
    return Answer(question, verdict, f"{text}.")


def _margin(analysis: Mapping[str, Any], accuracy: float) -> float:
    """About 1.96 standard errors of the difference of two mean accuracies over classes, on these images."""
    images, data = analysis["classes"]["images"], analysis["data"]
    share = data["feature_images"] / max(1, data["images"])
    inverse = [1 / max(1.0, share * count) for count in images if count]
    margin = _Z * math.sqrt(2 * accuracy * (1 - accuracy) * sum(inverse)) / max(1, len(inverse))
    return max(margin, _ROUNDED)


def _from_half(value: float) -> float:
    """Smallest where the variance of an accuracy is largest."""
    return abs(value - 0.5)


def _weighted(values: list[float | None], images: list[int]) -> float:
    return sum((value or 0.0) * count for value, count in zip(values, images, strict=True)) / max(1, sum(images))


def _measured(classes: Mapping[str, Any]) -> int:
    return sum(images > 0 for images in classes["images"])


def _weakest(classes: Mapping[str, Any]) -> list[int]:
    """At most 5 classes with mistakes, lowest accuracy first, and at most half of the classes."""
    accuracy, counts = classes["accuracy"], classes["train_images"]
    wrong = [label for label, value in enumerate(accuracy) if value is not None and value < 1]
    wrong.sort(key=lambda label: (accuracy[label], counts[label]))
    return wrong[: min(_NAMED, max(1, _measured(classes) // 2))]


def _name(classes: Mapping[str, Any], label: int) -> str:
    return clip(classes["name"][label])


def _reason(analysis: Mapping[str, Any], *sections: str) -> str:
    """Why sections are left out, to stand inside a sentence."""
    reasons = [analysis["left_out"][section] for section in sections if section in analysis["left_out"]]
    return str(reasons[0]).rstrip(".") if reasons else "it was not analysed"
