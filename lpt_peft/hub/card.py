"""The model card: README.md of a prompt file on the Hugging Face Hub, from its config.json.

It says what the file says and what the caller gave; no license, dataset or base model is made up. Not here: whether a
repository has a card already (`push.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from lpt_peft._text import printable
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import can_build
from lpt_peft.checkpoint import tensor_bytes

CARD_NAME = "README.md"
_SHOTS = ("many", "medium", "few")
_ACCURACIES = ("overall", *_SHOTS)  # and what is called an accuracy
_PARTS = ("test", "validation")
_HEADS = ("head.", "head_dist.", "classifier.")
_PAPER = "https://arxiv.org/abs/2210.01033"


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What only the caller knows; see `push_files`."""

    license: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: str | None = None


def model_card(
    config: Mapping[str, Any],
    repo_id: str,
    options: CardOptions = CardOptions(),
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> str:
    """README.md for a prompt file.

    Args:
        config: Checked content of its config.json. Accuracies from 0 to 1 are read from `training["metrics"]`, or from
            "test" or else "validation" therein: overall, many, medium, few and whatever is called an accuracy; their
            shot rule from `training["rule"]` or `training["metrics"]["rule"]`.
        repo_id: "owner/name", for the snippet.
        options: License, datasets, tags, base model.
        subfolder: Where in the repository the file is.
        revision: The branch it is on, if that is not "main".
    """
    base = options.base_model or base_model_of(config["backbone"])
    results = list(_results(config, options.datasets))
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
    body = "\n\n".join(_sections(config, repo_id, subfolder, revision))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def base_model_of(backbone: Mapping[str, Any]) -> str | None:
    """The backbone's Hub id where the weights of that model, if they are in the local cache, are the backbone's own.

    timm names a Hub id for randomly initialised models too, so the name alone proves nothing.
    """
    revision = backbone["hub_revision"]
    # A name from the file is joined to a path by the client and what is there is read: none but a commit goes in.
    if backbone["hub_id"] is None or not (revision is None or re.fullmatch("[0-9a-f]{40}", revision)):
        return None
    try:
        path = try_to_load_from_cache(backbone["hub_id"], "model.safetensors", revision=revision)
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
    return backbone["hub_id"] if found == backbone["fingerprint"] else None


def _figures(config: Mapping[str, Any]) -> dict[str, float]:
    metrics = config["training"].get("metrics")
    if not isinstance(metrics, dict):
        return {}
    if (part := _part(metrics)) is not None:
        metrics = metrics[part]
    return {
        name: float(value)
        for name, value in metrics.items()
        if (name in _ACCURACIES or name.endswith("accuracy"))
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= 1
    }


def _part(metrics: Mapping[str, Any]) -> str | None:
    """The part of the data that the figures are of, where metrics are told by part."""
    return next((part for part in _PARTS if isinstance(metrics.get(part), dict)), None)


def _rule(config: Mapping[str, Any]) -> str | None:
    training = config["training"]
    metrics = training.get("metrics")
    rule = training.get("rule") or (metrics.get("rule") if isinstance(metrics, dict) else None)
    return rule if isinstance(rule, str) else None


def _results(config: Mapping[str, Any], datasets: tuple[str, ...]) -> Iterator[EvalResult]:
    """Figures for the Hub's own table, which needs the name of one dataset."""
    rule, figures = _rule(config), _figures(config)
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


def _sections(config: Mapping[str, Any], repo_id: str, subfolder: str | None, revision: str | None) -> Iterator[str]:
    prompt, backbone = config["prompt"], config["backbone"]
    yield f"# {repo_id.rpartition('/')[2]}"
    yield (
        f"Prompts for {_code(backbone['architecture'])}, {config['head']['num_classes']} classes, learnt by "
        f"[Long-tailed Prompt Tuning]({_PAPER}) with `lpt_peft`. The backbone is frozen and not in this repository."
    )
    yield "## Load it"
    yield _snippet(config, repo_id, subfolder, revision)
    if figures := _figures(config):
        yield "## Results"
        part = _part(config["training"]["metrics"])
        yield _table(figures, f"accuracy on the {part} part" if part else "accuracy on")
        yield _shot_rule(_rule(config))
    yield "## What is in it"
    learnt = {name: math.prod(spec["shape"]) for name, spec in config["tensors"].items()}
    head = learnt["head.weight"]
    yield "\n".join(
        [
            f"- prompts and keys: {sum(learnt.values()) - head:,} parameters; head: {head:,}; "
            f"{tensor_bytes(config):,} bytes in all",
            f"- phase: {prompt['phase']}; {prompt['prompt_length']} tokens in each of {prompt['depth']} blocks, "
            f"{prompt['pool_size']} groups after block {prompt['shared_layers']}, {prompt['top_k']} for an image",
            f"- backbone: {_code(backbone['architecture'])} of {_code(backbone['library'])}, tag "
            f"{_code(str(backbone['pretrained_tag']))}, {backbone['num_parameters']:,} parameters, fingerprint "
            f"`{backbone['fingerprint'][:16]}`",
            f"- images: {' x '.join(map(str, config['preprocess']['input_size']))}, mean "
            f"{config['preprocess']['mean']}, std {config['preprocess']['std']}",
        ]
    )
    recipe = config["training"].get("recipe")
    if isinstance(recipe, dict) and recipe:
        yield "## Recipe"
        yield "\n".join(f"- {_code(name)}: {_code(str(value))}" for name, value in sorted(recipe.items()))


def _snippet(config: Mapping[str, Any], repo_id: str, subfolder: str | None, revision: str | None) -> str:
    options = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    options += f", revision={json.dumps(revision)}" if revision not in (None, "main") else ""
    given = not can_build(config["backbone"])
    vit = ", vit" if given else ""
    size = ", ".join(map(str, config["preprocess"]["input_size"]))
    return "\n".join(
        [
            "```python",
            "import torch",
            "from lpt_peft import LongTailPromptAdapter",
            "",
            *(["# vit: the very backbone these prompts were learnt on, see below"] if given else []),
            f'adapter = LongTailPromptAdapter.from_pretrained("{repo_id}"{vit}{options}).eval()',
            f"logits = adapter(torch.rand(1, {size}))  # normalised images; see below",
            "```",
        ]
    )


def _table(figures: Mapping[str, float], title: str) -> str:
    """Shots first; what else was measured behind them."""
    names = [name for name in _SHOTS if name in figures] + sorted(figures.keys() - set(_SHOTS))
    rows = [f"| {_code(name)} | {100 * figures[name]:.1f} |" for name in names]
    return "\n".join([f"| {title} | % |", "|---|---|", *rows])


def _shot_rule(rule: str | None) -> str:
    return f"Shot rule: {_code(rule)}." if rule else "The run did not record its shot rule."


def _line(text: str) -> str:
    """One short line: what a file says must not become structure of the card."""
    return printable(text, instead=" ").strip()


def _code(text: str) -> str:
    """The same as a code span, in which neither HTML nor Markdown means anything."""
    return "`" + _line(text).replace("`", " ").replace("|", " ") + "`"
