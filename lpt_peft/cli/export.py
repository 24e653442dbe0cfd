"""`lpt-peft export MODEL`: export a trained model to ONNX, torch.export or AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.inference import ExportResult

_FOLDER = "export"


def export(
    model: tyro.conf.Positional[str],
    tasks: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    output: Path | None = None,
    format: Literal["onnx", "pt2", "aoti"] = "onnx",
    dtype: Literal["float32", "float16"] = "float32",
    swappable: bool = False,
    route: Literal["exact", "router"] = "exact",
    device: str = "cpu",
    as_json: Json = False,
) -> None:
    """Export a trained model as a file that runs without lpt_peft, and compare its results with those of the model.

    Args:
        model: Output folder of `lpt-peft train`, a prompt file or model file, or OWNER/NAME on the Hugging Face Hub.
        tasks: With --swappable: further models on the same backbone.
        output: Folder to write, which must not exist; None: export/ in the folder of MODEL.
        format: onnx; pt2, a program of torch.export; or aoti, compiled for this kind of machine by AOTInductor.
        dtype: Of the backbone; inputs and outputs are float32 in both cases.
        swappable: Make prompts and head inputs of the graph, and write those of each model to tasks/NAME.npz.
        route: How groups are selected: exact, or router, by the router in the prompt file without the second pass.
        device: Device of an aoti package, such as cuda.
        as_json: Print one JSON object.
    """
    with requires_extra("lpt-peft export", "cli"):
        from lpt_peft.cli.common.paths import check_new_folder
        from lpt_peft.cli.common.streams import print_json
        from lpt_peft.inference import export_model
        from lpt_peft.inference.source import load_model

    if tasks and not swappable:
        raise ConfigError(f"{tasks[0]} is a further task, which needs --swappable; without it, export each run alone.")
    names = _task_names([model, *tasks]) if swappable else [None]
    target = _default_folder(model) if output is None else output
    check_new_folder(target)
    loaded: Any = load_model(model, device="cpu")
    if route != "exact":
        if not hasattr(loaded, "route"):
            raise ConfigError(f"--route {route} selects groups of prompts, and {model} has none: leave it out.")
        loaded.route = route
    result = export_model(
        loaded,
        target,
        format=format,
        dtype=dtype,
        task=names[0],
        tasks={str(name): source for name, source in zip(names[1:], tasks, strict=True)},
        device=device,
        progress=notice,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print("\n".join(_lines(result)))


def _default_folder(model: str) -> Path:
    from lpt_peft.hub.pull import is_repository

    if "/" in model and is_repository(model):
        raise ConfigError(f"{model} is no folder here: give --output FOLDER for the export of a model on the Hub.")
    path = Path(model)
    return (path.parent if path.is_file() else path) / _FOLDER


def _task_names(models: list[str]) -> list[str]:
    """A name for each task: that of its run, of the folder of its file, or of its repository."""
    names = []
    for model in models:
        path = Path(model).resolve()
        path = path.parent if path.is_file() else path
        names.append(path.parent.name if path.name in ("prompts", "model") else path.name)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"Two tasks have the name {twice[0]}, which is that of their folder: rename one of the folders."
        )
    return names


def _lines(result: ExportResult) -> list[str]:
    deviation = result.deviation
    checked = "not compared" if deviation is None else f"logits differ by {deviation:.1e} of their size from the model"
    lines = [f"{result.file}: {checked}"]
    lines += [f"inputs   {', '.join(result.inputs)}", f"outputs  {', '.join(result.outputs)}"]
    return lines + [f"task     {result.file.parent / 'tasks' / name}.npz" for name in result.tasks]
