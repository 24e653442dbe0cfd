"""Export a trained model: write, open, compare with the model, and keep the folder only if both agree."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpt_peft._files import new_folder
from lpt_peft._json import dumps
from lpt_peft._version import __version__
from lpt_peft.checkpoint.files import expand_user
from lpt_peft.errors import ConfigError
from lpt_peft.inference.export import formats
from lpt_peft.inference.export.formats import DESCRIPTION, EXTRA, FILE_NAMES, FORMATS, ExportFormat, Runner
from lpt_peft.inference.export.graph import DTYPES, ExportDtype, Graph, export_graph, inference_copy
from lpt_peft.inference.export.tasks import Model, Task, check_task_name, graph_settings, load_task, task_of
from lpt_peft.inference.export.verify import Expected, expected_of, verification_images, verify
from lpt_peft.vit_classifier import ViTClassifier

TASKS = "tasks"
"""Folder of the tasks in an export with exchangeable tasks."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export has written.

    Attributes:
        file: The graph.
        tasks: Names of the exchangeable tasks; empty if the tensors are constants.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
        deviation: Largest deviation of the logits from those of the model, relative to the largest logit; None if the
            file was not run, because onnxruntime is not installed.
    """

    file: Path
    tasks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    deviation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of plain JSON values."""
        return {**asdict(self), "file": str(self.file)}


def export_model(
    model: Model,
    folder: str | PathLike[str],
    *,
    format: ExportFormat = "onnx",
    dtype: ExportDtype = "float32",
    task: str | None = None,
    tasks: Mapping[str, str | PathLike[str]] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> ExportResult:
    """Export a trained model as a file that runs without lpt_peft, and compare its results with those of the model.

    The graph takes `images` (B, 3, H, W) float32, preprocessed, with any B and the H and W of the backbone. It returns
    `logits` (B, C) float32, `probabilities` (B, C) float32 with the fitted temperature, and in phase "group" `groups`
    (B, k) int64. `model.json` beside it holds class names, preprocessing, inputs and outputs; an ONNX file holds them
    as metadata as well, and a program of torch.export as the extra file `model.json`.

    With `task`, the trained tensors are inputs of the graph under the names that they have in prompt files, followed by
    the scalars `logit_scale` and `temperature`. Each task is written as `tasks/NAME.npz` with these inputs, and
    `tasks/NAME.json` with its class names and preprocessing. Tasks may differ in classes and number of groups.

    Args:
        model: An adapter in the phase that is exported, or a classifier; it is not changed.
        folder: Folder to write, which must not exist. It appears complete, and only if the comparison succeeds.
        format: "onnx"; "pt2", a program of torch.export; or "aoti", a package that AOTInductor compiles for this kind
            of machine.
        dtype: Of the backbone's weights and arithmetic. Inputs and outputs, prompts and head are float32 in both cases.
        task: Name of the model's own task; makes tasks exchangeable. None: the tensors are constants.
        tasks: Further tasks by name: prompt files (a folder, or "owner/name" on the Hub), or model files of linear
            probes. Needs `task`.
        preprocess: Replaces values of `model.preprocess()` in the description.
        device: Device of an "aoti" package.

    Returns:
        The written file and the deviation.

    Raises:
        ConfigError: An argument is invalid, or the folder exists.
        InputError: A task does not fit the graph of the model.
        PromptFileError: The prompt file of a task is refused, or is for another backbone.
        StateError: The model was unwrapped.
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The model cannot be traced or compiled, or the file returns other results; nothing is kept.
        OSError: The disk is full, or the folder is not writable.

    Example:
        >>> import tempfile, timm, torch
        >>> from lpt_peft import LongTailPromptAdapter
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export_model(adapter, f"{folder}/export", format="pt2")
        ...     program = torch.export.load(result.file).module()
        ...     logits, probabilities = program(torch.randn(4, 3, 32, 32))
        >>> logits.shape, result.deviation < 1e-4
        (torch.Size([4, 5]), True)
    """
    path = expand_user(folder)
    _check_arguments(path, format=format, dtype=dtype, device=device, task=task, tasks=tasks)
    if format == "onnx":
        formats.require_onnx()
    target = torch.device(device)
    reference = inference_copy(model, "float32", str(target))
    own = task_of(reference, preprocess)
    images = verification_images(tuple(own.preprocess["input_size"]))
    checks: list[tuple[str | None, Task, Expected]] = [(task, own, expected_of(reference, images, own.temperature))]
    exported = reference if dtype == "float32" else inference_copy(model, dtype, str(target))
    graph = export_graph(exported, own, swappable=task is not None)
    description = {**_description(reference, graph, format, dtype), **({} if task else own.description())}
    for name, source in (tasks or {}).items():
        load_task(reference, name, source)
        other = task_of(reference)
        checks.append((name, other, expected_of(reference, images, other.temperature)))
    with new_folder(path) as temporary:
        file = temporary / FILE_NAMES[format]
        run = _write(graph, file, format, description, target)
        (temporary / DESCRIPTION).write_text(dumps(description, indent=2) + "\n", encoding="utf-8")
        if task is not None:
            (temporary / TASKS).mkdir()
            for label, found, _ in checks:
                _write_task(temporary / TASKS, str(label), found)
        deviation = None if run is None else _verify(run, file, checks, images=images, dtype=dtype)
        del run  # closes the file, which Windows needs before it renames the folder
    if deviation is None:
        warnings.warn(
            f"{path / file.name} was not run and compared with the model: onnxruntime is not installed ({EXTRA}).",
            UserWarning,
            stacklevel=2,
        )
    names = () if task is None else tuple(str(name) for name, _, _ in checks)
    return ExportResult(
        file=path / file.name,
        tasks=names,
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        deviation=deviation,
    )


def _check_arguments(
    path: Path,
    *,
    format: str,
    dtype: str,
    device: str | torch.device,
    task: str | None,
    tasks: Mapping[str, Any] | None,
) -> None:
    if format not in FORMATS:
        raise ConfigError(f'format={format!r} must be "onnx", "pt2" or "aoti".')
    if dtype not in DTYPES:
        raise ConfigError(f'dtype={dtype!r} must be "float32" or "float16".')
    if format != "aoti" and torch.device(device).type != "cpu":
        raise ConfigError(f'device={str(device)!r} is for format="aoti": {format} files run on any device.')
    if tasks and task is None:
        raise ConfigError("tasks= makes the trained tensors inputs of the graph: name the model's own task by task=.")
    for name in [] if task is None else [task, *(tasks or {})]:
        check_task_name(name)
    if task is not None and task in (tasks or {}):
        raise ConfigError(f"Two tasks have the name {task!r}: rename one of them.")
    if path.exists():
        raise ConfigError(f"{path} exists already: give the path of a new folder, or remove this folder first.")


def _description(model: Model, graph: Graph, format: str, dtype: str) -> dict[str, Any]:
    info = model.backbone.info()
    return {
        "format": f"lpt_peft-export-{format}",
        "lpt_peft_version": __version__,
        "method": model.method if isinstance(model, ViTClassifier) else "prompts",
        **{key: value for key, value in graph_settings(model).items() if key != "method"},
        "backbone": info.architecture,
        "fingerprint": model.fingerprint,
        "dtype": dtype,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
    }


def _write(
    graph: Graph, file: Path, format: ExportFormat, description: Mapping[str, Any], device: torch.device
) -> Runner | None:
    """Write and open the file; None if it cannot be run here."""
    if format == "onnx":
        formats.write_onnx(graph, file, description)
        return formats.open_onnx(file)
    if format == "pt2":
        formats.write_pt2(graph, file, description)
        return formats.open_pt2(file, graph.outputs)
    formats.write_aoti(graph, file)
    return formats.open_aoti(file, graph.outputs, device)


def _write_task(folder: Path, name: str, task: Task) -> None:
    data = io.BytesIO()
    np.savez(data, **{key: tensor.numpy() for key, tensor in task.inputs().items()})  # type: ignore[arg-type]
    (folder / f"{name}.npz").write_bytes(data.getvalue())
    (folder / f"{name}.json").write_text(dumps(task.description(), indent=2) + "\n", encoding="utf-8")


def _verify(
    run: Runner,
    file: Path,
    checks: list[tuple[str | None, Task, Expected]],
    *,
    images: torch.Tensor,
    dtype: ExportDtype,
) -> float:
    """Run the file with the written tensors of every task; return the largest deviation."""
    deviations = []
    for name, _, expected in checks:
        inputs = {}
        if name is not None:
            with np.load(file.parent / TASKS / f"{name}.npz") as arrays:
                inputs = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        label = file.name if name is None else f"{file.name} with the task {name}"
        deviations.append(verify(run, inputs, images=images, expected=expected, dtype=dtype, name=label))
    return max(deviations)
