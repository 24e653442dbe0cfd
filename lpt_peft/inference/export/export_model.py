"""Export a trained model: write, open, compare with the model, and keep the folder only if both agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lpt_peft._files import new_folder
from lpt_peft._json import dumps
from lpt_peft._version import __version__
from lpt_peft.checkpoint.files import expand_user
from lpt_peft.errors import ConfigError
from lpt_peft.inference.export.formats import DESCRIPTION, FILE_NAMES, FORMATS, TASKS, ExportFormat, Runner
from lpt_peft.inference.export.graph import DTYPES, ExportDtype, Graph, check_exportable, export_graph, inference_copy
from lpt_peft.inference.export.onnx_files import ADAPTER, EXTRA, OnnxSession, require_onnx, write_adapter, write_onnx
from lpt_peft.inference.export.tasks import (
    Model,
    Task,
    check_task_name,
    graph_settings,
    load_task,
    task_of,
    write_task,
)
from lpt_peft.inference.export.torch_files import open_aoti, open_pt2, write_aoti, write_pt2
from lpt_peft.inference.export.verify import Expected, expected_of, explained, verification_images, verify_tasks
from lpt_peft.inference.source import check_device


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
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a trained model as a file that runs without lpt_peft, and compare its results with those of the model.

    The graph takes `images` (B, 3, H, W) float32, preprocessed, with any B and the H and W of the backbone. It returns
    `logits` (B, C) float32, `probabilities` (B, C) float32 with the fitted temperature, and in phase "group" `groups`
    (B, k) int64. `model.json` beside it holds class names, preprocessing, inputs and outputs; an ONNX file and an
    AOTInductor package hold them as metadata as well, and a program of torch.export as the extra file `model.json`.

    With `task`, the trained tensors are inputs of the graph under the names that they have in prompt files, followed by
    `logit_scale` (1,) and `temperature` (1,). Each task is written as `tasks/NAME.npz` with these inputs,
    `tasks/NAME.json` with its class names and preprocessing, and for ONNX `tasks/NAME.onnx_adapter`, the inputs in the
    adapter format of onnxruntime. Tasks may differ in classes, logit scale, temperature and number of groups.

    Args:
        model: An adapter in the phase that is exported, or a classifier; it is not changed.
        folder: Folder to write, which must not exist. It appears complete, and only if the comparison succeeds.
        format: "onnx"; "pt2", a program of torch.export; or "aoti", a package that AOTInductor compiles for this kind
            of machine, and which takes contiguous tensors only, without a check.
        dtype: Of the backbone's weights and arithmetic. Inputs and outputs, prompts and head are float32 in both cases.
        task: Name of the model's own task; makes tasks exchangeable. None: the tensors are constants.
        tasks: Further tasks by name: folders of runs or prompt files, or "owner/name" on the Hub; for a linear probe
            folders of runs or model files. Needs `task`.
        device: Device of an "aoti" package.
        progress: Called with a line of text before each step that takes long.

    Returns:
        The written file and the deviation.

    Raises:
        ConfigError: An argument is invalid, or the folder exists.
        InputError: A task does not fit the graph of the model.
        PromptFileError, ModelFileError: The file of a task is refused, or is for another backbone.
        StateError: The model was unwrapped, or the run of a task has not written its result yet.
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
    check_exportable(model, swappable=task is not None)
    report = progress or (lambda line: None)
    target = torch.device(device)
    reference = inference_copy(model, "float32", str(target))
    own = task_of(reference)
    images = verification_images(tuple(own.preprocess["input_size"]))
    checks: list[tuple[str | None, Task, Expected]] = [(task, own, expected_of(reference, images, own.temperature))]
    for name, source in (tasks or {}).items():
        load_task(reference, name, source)
        other = task_of(reference)
        checks.append((name, other, expected_of(reference, images, other.temperature)))
    report(f"tracing {type(model.vit).__name__}")
    exported = reference if dtype == "float32" else inference_copy(model, dtype, str(target))
    graph = export_graph(exported, own, swappable=task is not None)
    description = {**_description(reference, graph, format, dtype), **({} if task else own.description())}
    with new_folder(path) as temporary:
        file = temporary / FILE_NAMES[format]
        report(_LONG_STEPS[format])
        _write(graph, file, format, description)
        (temporary / DESCRIPTION).write_text(dumps(description, indent=2) + "\n", encoding="utf-8")
        deviation = None
        with explained(file.name):
            run = _open(file, format, graph.outputs, target)
            if task is not None:
                (temporary / TASKS).mkdir()
                for label, found, _ in checks:
                    write_task(temporary / TASKS, str(label), found)
                    if isinstance(run, OnnxSession):
                        write_adapter(temporary / TASKS / f"{label}{ADAPTER}", found.inputs())
            if run is not None:
                report("comparing the file with the model")
                expected = {name: results for name, _, results in checks}
                deviation = verify_tasks(run, file, expected, images=images, dtype=dtype)
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


_LONG_STEPS: dict[ExportFormat, str] = {
    "onnx": "converting to ONNX",
    "pt2": "writing the program",
    "aoti": "compiling with AOTInductor, for one to several minutes",
}


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
    check_device(device)
    if format != "aoti" and torch.device(device).type != "cpu":
        raise ConfigError(f'device={str(device)!r} is for format="aoti": {format} files run on any device.')
    if tasks and task is None:
        raise ConfigError("tasks= makes the trained tensors inputs of the graph: name the model's own task by task=.")
    for name in [] if task is None else [task, *(tasks or {})]:
        check_task_name(name)
    if task is not None and task in (tasks or {}):
        raise ConfigError(f"Two tasks have the name {task!r}: rename one of them.")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already: give the path of a new folder, or remove this folder first.")
    if format == "onnx":
        require_onnx()


def _description(model: Model, graph: Graph, format: str, dtype: str) -> dict[str, Any]:
    info = model.backbone.info()
    return {
        "format": f"lpt_peft-export-{format}",
        "lpt_peft_version": __version__,
        **graph_settings(model),
        "backbone": info.architecture,
        "fingerprint": model.fingerprint,
        "dtype": dtype,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
    }


def _write(graph: Graph, file: Path, format: ExportFormat, description: Mapping[str, Any]) -> None:
    if format == "onnx":
        write_onnx(graph, file, description)
    elif format == "pt2":
        write_pt2(graph, file, description)
    else:
        write_aoti(graph, file, description)


def _open(file: Path, format: ExportFormat, outputs: list[str], device: torch.device) -> Runner | None:
    """Open the file; None if it cannot be run here, because onnxruntime is not installed."""
    if format == "pt2":
        return open_pt2(file, outputs)
    if format == "aoti":
        return open_aoti(file, outputs, device)
    try:
        return OnnxSession(file)
    except ImportError:
        return None
