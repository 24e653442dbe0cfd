"""The card: front matter for the Hub, then sections for readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from lpt_peft.checkpoint import PromptContent
from lpt_peft.hub.card.base_model import base_model_of
from lpt_peft.hub.card.classes import classes_section
from lpt_peft.hub.card.markdown import code
from lpt_peft.hub.card.recipe import recipe_section
from lpt_peft.hub.card.results import figures_of, hub_results, results_of_split, results_section
from lpt_peft.hub.card.snippets import load_snippet, preprocess_section

CARD_NAME = "README.md"
_PAPER = "https://arxiv.org/abs/2210.01033"
_CAPTIONS = {"accuracy.png": "Accuracy of each class, frequent to rare, above the number of its training images"}


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Facts that only the caller knows; see `push`."""

    license: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    results: Mapping[str, Any] | None = None
    default_recipe: Mapping[str, Any] | None = None


def model_card(
    content: PromptContent,
    repo_id: str,
    options: CardOptions = CardOptions(),
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    pictures: tuple[str, ...] = (),
) -> str:
    """README.md for a prompt file.

    Args:
        content: The prompt file. Accuracies from 0 to 1 are read from `training["metrics"]`, or from its "test" or
            else "validation": overall, many, medium, few and names that end with "accuracy"; their shot rule is read
            from `training["rule"]` or `training["metrics"]["rule"]`.
        repo_id: "owner/name", for the snippet.
        options: License, datasets, tags, base model, results.
        subfolder: Folder of the file in the repository.
        revision: Its branch, if that is not "main".
        pictures: Paths of pictures in the repository.

    Raises:
        InputError: `options.results` are incomplete or describe other prompts.
    """
    training = content.metadata.training
    base = options.base_model or base_model_of(content)
    results = list(hub_results(training, options.datasets))
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
    body = "\n\n".join(_sections(content, repo_id, options, subfolder, revision, pictures=pictures))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def picture_link(path: str) -> str:
    """The Markdown that shows a picture of the repository."""
    name = path.rpartition("/")[2]
    return f"![{_CAPTIONS.get(name, name)}]({quote(path)})"


def _sections(
    content: PromptContent,
    repo_id: str,
    options: CardOptions,
    subfolder: str | None,
    revision: str | None,
    *,
    pictures: tuple[str, ...],
) -> Iterator[str]:
    metadata = content.metadata
    details = results_of_split(content, options.results)
    recipe = metadata.training.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    yield f"# {repo_id.rpartition('/')[2]}"
    method = recipe.get("method", "lpt")
    trained = f"[Long-tailed Prompt Tuning]({_PAPER})" if method == "lpt" else f"the method {code(method)}"
    yield (
        f"Prompts for {code(content.backbone.architecture)}, {content.config.num_classes} classes, trained by "
        f"{trained} with `lpt_peft`. The backbone is frozen and not in this repository."
    )
    yield "## Load it"
    yield load_snippet(content, repo_id, subfolder, revision)
    yield "## Preprocess images"
    yield from preprocess_section(content.preprocess)
    figures = figures_of(metadata.training)
    if figures or pictures:
        yield "## Results"
    if figures:
        yield from results_section(metadata.training, details)
    yield from map(picture_link, pictures)
    if classes := list(classes_section(metadata, details)):
        yield "## Classes"
        yield from classes
    yield "## Contents"
    yield "\n".join(f"- {item}" for item in _contents(content, method if recipe else None))
    if recipe:
        yield "## Recipe"
        yield from recipe_section(recipe, options.default_recipe)


def _contents(content: PromptContent, method: Any) -> Iterator[str]:
    config, backbone, temperature = content.config, content.backbone, content.metadata.temperature
    sizes = {name: math.prod(shape) for name, shape in config.tensor_shapes.items()}
    head = sizes["head.weight"]
    if method is not None:
        yield f"method: {code(method)}"
    yield f"phase: {content.phase}; {config.layout}"
    yield f"placement: {config.placement}"
    if config.has_groups:
        router = content.router
        yield f"router: {'none' if router is None else f'{router.describe()}; `adapter.route` enables it'}"
    if temperature is not None:
        yield f"temperature: divide the logits by {temperature:.4g} before the softmax for calibrated probabilities"
    yield (
        f"prompts and keys: {sum(sizes.values()) - head:,} parameters; head: {head:,}; "
        f"{sum(tensor.nbytes for tensor in content.tensors.values()):,} bytes in all"
    )
    yield (
        f"backbone: {code(backbone.architecture)} of {code(backbone.library)}, tag {code(backbone.pretrained_tag)}, "
        f"{backbone.num_parameters:,} parameters, fingerprint `{content.fingerprint[:16]}`"
    )
