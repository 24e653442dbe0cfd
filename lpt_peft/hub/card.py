"""Model card (README.md) of a prompt file on the Hugging Face Hub.

It contains facts from the file and from the caller; license, datasets and base model are never guessed. Not here:
whether a repository already has a card (`push.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from lpt_peft._text import printable
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import can_build
from lpt_peft.checkpoint import PromptContent

CARD_NAME = "README.md"
_SHOTS = ("many", "medium", "few")
_ACCURACIES = ("overall", *_SHOTS)  # besides names that end with "accuracy"
_SPLITS = ("test", "validation")
_HEADS = ("head.", "head_dist.", "classifier.")
_PAPER = "https://arxiv.org/abs/2210.01033"


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Facts that only the caller knows; see `push`."""

    license: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: str | None = None


def model_card(
    content: PromptContent,
    repo_id: str,
    options: CardOptions = CardOptions(),
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> str:
    """README.md for a prompt file.

    Args:
        content: The prompt file. Accuracies from 0 to 1 are read from `training["metrics"]`, or from its "test" or
            else "validation": overall, many, medium, few and names that end with "accuracy"; their shot rule is read
            from `training["rule"]` or `training["metrics"]["rule"]`.
        repo_id: "owner/name", for the snippet.
        options: License, datasets, tags, base model.
        subfolder: Folder of the file in the repository.
        revision: Its branch, if that is not "main".
    """
    training = content.metadata.training
    base = options.base_model or base_model_of(content)
    results = list(_results(training, options.datasets))
    data = ModelCardData(
        library_name="lpt_peft",
        pipeline_tag="image-classification",
        base_model=base,
        base_model_relation="adapter" if base else None,
        license=options.license,
        datasets=list(options.datasets) or None,
        tags=["lpt", "long-tailed-recognition", "prompt-tuning", *options.tags],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    body = "\n\n".join(_sections(content, repo_id, subfolder, revision))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def base_model_of(content: PromptContent) -> str | None:
    """The backbone's Hub id, if the local cache holds that model and its weights are the backbone's.

    timm states a Hub id for randomly initialized models too, so the id alone proves nothing.
    """
    hub_id, revision = content.backbone.hub_id, content.backbone.hub_revision
    # The client joins the revision to a path and reads the file there, so only a commit is accepted.
    if hub_id is None or not (revision is None or re.fullmatch("[0-9a-f]{40}", revision)):
        return None
    try:
        path = try_to_load_from_cache(hub_id, "model.safetensors", revision=revision)
    except ValueError:  # not the name of a repository
        return None
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(_HEADS)]  # noqa: SIM118 - not a dict
            found = fingerprint(file.get_tensor(name) for name in names)
    except (OSError, SafetensorError):
        return None
    return hub_id if found == content.fingerprint else None


def _figures(training: Mapping[str, Any]) -> dict[str, float]:
    metrics = training.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    if (split := _split(metrics)) is not None:
        metrics = metrics[split]
    return {
        name: float(value)
        for name, value in metrics.items()
        if (name in _ACCURACIES or name.endswith("accuracy"))
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= 1
    }


def _split(metrics: Mapping[str, Any]) -> str | None:
    """The split whose figures are shown, if the metrics are grouped by split."""
    return next((split for split in _SPLITS if isinstance(metrics.get(split), dict)), None)


def _rule(training: Mapping[str, Any]) -> str | None:
    metrics = training.get("metrics")
    rule = training.get("rule") or (metrics.get("rule") if isinstance(metrics, dict) else None)
    return rule if isinstance(rule, str) else None


def _results(training: Mapping[str, Any], datasets: tuple[str, ...]) -> Iterator[EvalResult]:
    """Figures for the Hub's own table, which needs the name of exactly one dataset."""
    rule, figures = _rule(training), _figures(training)
    if rule is None or len(datasets) != 1:
        return
    for shot in _SHOTS:
        if shot in figures:
            yield EvalResult(
                task_type="image-classification",
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                metric_type="accuracy",
                metric_name=f"{shot}-shot accuracy ({_line(rule)})",
                metric_value=round(figures[shot], 4),
            )


def _sections(content: PromptContent, repo_id: str, subfolder: str | None, revision: str | None) -> Iterator[str]:
    config, backbone, training = content.config, content.backbone, content.metadata.training
    yield f"# {repo_id.rpartition('/')[2]}"
    yield (
        f"Prompts for {_code(backbone.architecture)}, {config.num_classes} classes, trained by "
        f"[Long-tailed Prompt Tuning]({_PAPER}) with `lpt_peft`. The backbone is frozen and not in this repository."
    )
    yield "## Load it"
    yield _snippet(content, repo_id, subfolder, revision)
    if figures := _figures(training):
        yield "## Results"
        split = _split(training["metrics"])
        yield _table(figures, f"accuracy on the {split} split" if split else "accuracy on")
        yield _shot_rule(_rule(training))
    yield "## Contents"
    sizes = {name: math.prod(shape) for name, shape in config.tensor_shapes.items()}
    head = sizes["head.weight"]
    preprocess = content.preprocess
    yield "\n".join(
        [
            f"- prompts and keys: {sum(sizes.values()) - head:,} parameters; head: {head:,}; "
            f"{sum(tensor.nbytes for tensor in content.tensors.values()):,} bytes in all",
            f"- phase: {content.phase}; {config.layout}",
            *([] if content.router is None else [f"- router: {content.router.describe()}; `adapter.route` enables it"]),
            f"- backbone: {_code(backbone.architecture)} of {_code(backbone.library)}, tag "
            f"{_code(str(backbone.pretrained_tag))}, {backbone.num_parameters:,} parameters, fingerprint "
            f"`{content.fingerprint[:16]}`",
            f"- images: {' x '.join(map(str, preprocess['input_size']))}, mean {preprocess['mean']}, std "
            f"{preprocess['std']}",
        ]
    )
    recipe = training.get("recipe")
    if isinstance(recipe, dict) and recipe:
        yield "## Recipe"
        yield "\n".join(f"- {_code(name)}: {_code(str(value))}" for name, value in sorted(recipe.items()))


def _snippet(content: PromptContent, repo_id: str, subfolder: str | None, revision: str | None) -> str:
    options = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    options += f", revision={json.dumps(revision)}" if revision not in (None, "main") else ""
    given = not can_build(asdict(content.backbone))
    vit = ", vit" if given else ""
    size = ", ".join(map(str, content.preprocess["input_size"]))
    return "\n".join(
        [
            "```python",
            "import torch",
            "from lpt_peft import LongTailPromptAdapter",
            "",
            *(["# vit: the backbone that these prompts were trained on, see below"] if given else []),
            f'adapter = LongTailPromptAdapter.from_pretrained("{repo_id}"{vit}{options})',
            f"logits = adapter(torch.rand(1, {size}))  # normalized images; see below",
            "```",
        ]
    )


def _table(figures: Mapping[str, float], title: str) -> str:
    """Rows of accuracies, shots first."""
    names = [name for name in _SHOTS if name in figures] + sorted(figures.keys() - set(_SHOTS))
    rows = [f"| {_code(name)} | {100 * figures[name]:.1f} |" for name in names]
    return "\n".join([f"| {title} | % |", "|---|---|", *rows])


def _shot_rule(rule: str | None) -> str:
    return f"Shot rule: {_code(rule)}." if rule else "The run did not record its shot rule."


def _line(text: str) -> str:
    """One short line, so that text of the file cannot become structure of the card."""
    return printable(text, replacement=" ").strip()


def _code(text: str) -> str:
    """The same as a code span, in which HTML and Markdown have no meaning."""
    return "`" + _line(text).replace("`", " ").replace("|", " ") + "`"
