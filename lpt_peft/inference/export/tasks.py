"""Tasks of an export: the trained tensors of a model, and how its results are read.

A model has a task at a time: `task_of` collects it, `load_task` replaces it by that of another prompt file or model
file. Not here: the graph that takes the tensors as inputs (`graph.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint.model_file import HEAD_WEIGHT, read_model_file
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.heads import CosineClassifier
from lpt_peft.vit_classifier import ViTClassifier

Model = LongTailPromptAdapter | ViTClassifier
"""A model that can be exported."""
SCALE, TEMPERATURE = "logit_scale", "temperature"
"""Names of the two scalar inputs of a graph with exchangeable tasks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Trained tensors of a task and its classes.

    Attributes:
        tensors: Those that the phase uses, by their names in prompt files: `shared.prompts` (L, n, d), `pool.prompts`
            (m, L-K, n, d), `pool.keys` (m, key_dim), `head.weight` (C, d); float32 on the CPU.
        logit_scale: Scale of the cosine classifier.
        temperature: Divisor of the logits for the probabilities; 1 if none was fitted.
        class_names: Name of each class.
        preprocess: How images become tensors, as in prompt files.
    """

    tensors: Mapping[str, Tensor]
    logit_scale: float
    temperature: float
    class_names: tuple[str, ...]
    preprocess: Mapping[str, Any]

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of a graph with exchangeable tasks besides the images, in order; the scalars are ()."""
        scalars = {SCALE: self.logit_scale, TEMPERATURE: self.temperature}
        return {**self.tensors, **{name: torch.tensor(value) for name, value in scalars.items()}}

    def description(self) -> dict[str, Any]:
        """Return class names, scalars and preprocessing as plain JSON values."""
        return {
            "class_names": list(self.class_names),
            SCALE: self.logit_scale,
            TEMPERATURE: self.temperature,
            "preprocess": _plain(self.preprocess),
        }


def task_of(model: Model, preprocess: Mapping[str, Any] | None = None) -> Task:
    """Collect the task that a model has.

    Args:
        model: An adapter or a classifier.
        preprocess: Replaces values of `model.preprocess()`.
    """
    if isinstance(model, ViTClassifier):
        tensors: Mapping[str, Tensor] = {HEAD_WEIGHT: model.head.weight}
    else:
        tensors = {name: model.get_parameter(name) for name in model.prompt_config.tensor_shapes if _used(name, model)}
    return Task(
        tensors={name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()},
        logit_scale=model.head.scale,
        temperature=model.metadata.temperature or 1.0,
        class_names=model.metadata.label_names or tuple(map(str, range(model.num_classes))),
        preprocess={**model.preprocess(), **(preprocess or {})},
    )


def load_task(model: Model, name: str, source: str | PathLike[str]) -> None:
    """Replace the prompts and the head of a model by those of a file.

    Args:
        model: Changed in place.
        name: Of the task, for messages.
        source: A prompt file for an adapter: a folder, or "owner/name" on the Hub. A model file for a classifier.

    Raises:
        InputError: The file is for another graph: another method, phase or size of prompts.
        PromptFileError: The file is refused, or is for another backbone.
        ModelFileError: The file is refused.
        HubError: The Hub did not deliver the prompts.
    """
    before = graph_settings(model)
    if isinstance(model, ViTClassifier):
        _load_head(model, name, source)
    else:
        with warnings.catch_warnings():  # another number of classes is expected here
            warnings.simplefilter("ignore", UserWarning)
            model.load_prompts(source)
    after = graph_settings(model)
    if different := [key for key in before if before[key] != after.get(key)]:
        key = different[0]
        raise InputError(
            f"The task {name} has {key}={after.get(key)!r}, and the exported graph {key}={before[key]!r}: tasks of a "
            "graph differ only in their classes and in the number of groups. Export this task separately."
        )


def graph_settings(model: Model) -> dict[str, Any]:
    """Return the settings that are constants of the exported graph."""
    if isinstance(model, ViTClassifier):
        return {"method": model.method}
    config = model.prompt_config
    settings: dict[str, Any] = {
        "phase": model.phase,
        "placement": config.placement,
        "prompt_length": config.prompt_length,
    }
    if model.phase == "group":
        settings |= {"query": config.query, "shared_layers": config.shared_layers, "top_k": config.top_k}
    return settings


def check_task_name(name: str) -> None:
    """Refuse a name that cannot be the name of a file.

    Raises:
        ConfigError: The name is empty, begins with a dot, or holds a character that file systems refuse.
    """
    if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
        raise ConfigError(f'The task name {name!r} must be the name of a file without / \\ : * ? " < > |.')


def _used(name: str, model: LongTailPromptAdapter) -> bool:
    return model.phase == "group" or not name.startswith("pool.")


def _load_head(model: ViTClassifier, name: str, source: str | PathLike[str]) -> None:
    content = read_model_file(source)
    if content.method != model.method or content.fingerprint != model.fingerprint:
        raise InputError(
            f"The task {name} ({fspath(source)}) was trained by {content.method} on a backbone with other weights, or "
            f"the exported model by {model.method}: only linear probes on the same backbone share a graph. Export it "
            "separately."
        )
    head = CosineClassifier(content.head.shape[1], len(content.head), content.logit_scale)
    head.weight.data = content.head.float()
    model.head, model.metadata = head.requires_grad_(False), content.metadata


def _plain(value: Any) -> Any:
    """Tuples as lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
