"""Tasks of an export: the trained tensors of a model, and how its results are read.

A model has a task at a time: `task_of` collects it, `load_task` replaces it by that of another prompt file or model
file. Not here: the graph that takes the tensors as inputs (`graph.py`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpt_peft._json import dumps
from lpt_peft._run_folder import existing_prompt_folder, model_folder
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint.files import expand_user
from lpt_peft.checkpoint.model_file import HEAD_WEIGHT, read_model_file
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.heads import CosineClassifier
from lpt_peft.hub.pull import is_repository
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
        """Return the inputs of a graph with exchangeable tasks besides the images, in order.

        The scalars have the shape (1,), since the adapter format of onnxruntime has no shape ().
        """
        scalars = {SCALE: self.logit_scale, TEMPERATURE: self.temperature}
        return {**self.tensors, **{name: torch.tensor([value]) for name, value in scalars.items()}}

    def description(self) -> dict[str, Any]:
        """Return class names, scalars and preprocessing as plain JSON values."""
        return {
            "class_names": list(self.class_names),
            SCALE: self.logit_scale,
            TEMPERATURE: self.temperature,
            "preprocess": _plain(self.preprocess),
        }


def task_of(model: Model) -> Task:
    """Collect the task that a model has."""
    if isinstance(model, ViTClassifier):
        tensors: Mapping[str, Tensor] = {HEAD_WEIGHT: model.head.weight}
    else:
        tensors = {name: model.get_parameter(name) for name in model.prompt_config.tensor_shapes if _used(name, model)}
    return Task(
        tensors={name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()},
        logit_scale=model.head.scale,
        temperature=model.metadata.temperature or 1.0,
        class_names=model.metadata.label_names or tuple(map(str, range(model.num_classes))),
        preprocess=model.preprocess(),
    )


def load_task(model: Model, name: str, source: str | PathLike[str]) -> None:
    """Replace the prompts and the head of a model by those of a file.

    Args:
        model: Changed in place.
        name: Of the task, for messages.
        source: For an adapter the folder of a run or of a prompt file, or "owner/name" on the Hub; for a classifier the
            folder of a run or of a model file.

    Raises:
        InputError: The file is for another graph: another method, phase, size of prompts or size of images.
        StateError: The run has not written its result yet, or was trained by a method without prompts.
        PromptFileError: The file is refused, or is for another backbone.
        ModelFileError: The file is refused.
        HubError: The Hub did not deliver the prompts.
    """
    before = graph_settings(model)
    if isinstance(model, ViTClassifier):
        _load_head(model, name, source)
    else:
        hub = isinstance(source, str) and "/" in source and is_repository(source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The head had .* classes and was replaced", UserWarning)  # as intended
            model.load_prompts(source if hub else existing_prompt_folder(expand_user(source)))
    after = graph_settings(model)
    if different := [key for key in before if before[key] != after.get(key)]:
        key = different[0]
        raise InputError(
            f"The task {name} has {key}={after.get(key)!r}, and the exported graph {key}={before[key]!r}: tasks of a "
            "graph differ only in their classes, logit scale, temperature and number of groups. Export this task "
            "separately."
        )


def write_task(folder: Path, name: str, task: Task) -> None:
    """Write `NAME.npz` with the inputs of a task, and `NAME.json` with its description."""
    data = io.BytesIO()
    np.savez(data, **{key: tensor.numpy() for key, tensor in task.inputs().items()})  # type: ignore[arg-type]
    (folder / f"{name}.npz").write_bytes(data.getvalue())
    (folder / f"{name}.json").write_text(dumps(task.description(), indent=2) + "\n", encoding="utf-8")


def read_inputs(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the inputs of a task that `write_task` wrote."""
    with np.load(folder / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def graph_settings(model: Model) -> dict[str, Any]:
    """Return the settings that are constants of the exported graph."""
    size = {"input_size": list(model.preprocess()["input_size"])}
    if isinstance(model, ViTClassifier):
        return {"method": model.method, **size}
    config = model.prompt_config
    settings: dict[str, Any] = {
        "method": "prompts",
        **size,
        "phase": model.phase,
        "placement": config.placement,
        "prompt_length": config.prompt_length,
    }
    if model.phase == "group":
        settings |= {"query": config.query, "shared_layers": config.shared_layers, "top_k": config.top_k}
        settings["route"] = model.route
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
    path = expand_user(source)
    if (folder := model_folder(path)) is None:
        existing_prompt_folder(path)  # the error of a path without any file
    content = None if folder is None else read_model_file(folder)
    if content is None or content.method != model.method or content.fingerprint != model.fingerprint:
        trained = "with prompts" if content is None else f"by {content.method}"
        raise InputError(
            f"The task {name} ({path}) was trained {trained}, or on a backbone with other weights, and the exported "
            f"model by {model.method}: only linear probes on the same backbone share a graph. Export it separately."
        )
    head = CosineClassifier(content.head.shape[1], len(content.head), content.logit_scale)
    head.weight.data = content.head.float()
    model.head, model.metadata = head.requires_grad_(False), content.metadata


def _plain(value: Any) -> Any:
    """Tuples as lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
