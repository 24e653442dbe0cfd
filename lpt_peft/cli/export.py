"""`lpt-peft export RUN`: export a trained model to ONNX, torch.export or AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.inference import ExportResult

_FOLDER = "export"


def export(
    folder: tyro.conf.Positional[Path],
    tasks: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    *,
    output: Path | None = None,
    format: Literal["onnx", "pt2", "aoti"] = "onnx",
    dtype: Literal["float32", "float16"] = "float32",
    swappable: bool = False,
    device: str = "cpu",
    as_json: Json = False,
) -> None:
    """Export a trained model as a file that runs without lpt_peft, and compare its results with those of the model.

    Args:
        folder: Output folder of `lpt-peft train`, or a prompt file or model file.
        tasks: With --swappable: further runs, prompt files or model files on the same backbone.
        output: Folder to write, which must not exist; None: export/ in FOLDER.
        format: onnx; pt2, a program of torch.export; or aoti, compiled for this kind of machine by AOTInductor.
        dtype: Of the backbone; inputs and outputs are float32 in both cases.
        swappable: Make prompts and head inputs of the graph, and write those of each task to tasks/NAME.npz.
        device: Device of an aoti package, such as cuda.
        as_json: Print one JSON object.
    """
    with requires_extra("lpt-peft export", "train"):
        from lpt_peft.cli.common.load_run import load_run
        from lpt_peft.cli.common.paths import check_new_folder
        from lpt_peft.cli.common.streams import print_json
        from lpt_peft.inference import export_model

    if tasks and not swappable:
        raise ConfigError(f"{tasks[0]} is a further task, which needs --swappable; without it, export each run alone.")
    target = (folder.parent if folder.is_file() else folder) / _FOLDER if output is None else output
    check_new_folder(target)
    names = _task_names([folder, *tasks]) if swappable else [None]
    run = load_run(folder)
    result = export_model(
        run.model,
        target,
        format=format,
        dtype=dtype,
        task=names[0],
        tasks={str(name): _source(path) for name, path in zip(names[1:], tasks, strict=True)},
        preprocess=run.images.preprocess(),
        device=device,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print("\n".join(_lines(result)))


def _task_names(folders: list[Path]) -> list[str]:
    """A name for each task: that of its run or of the folder of its file."""
    names = []
    for folder in folders:
        path = folder.resolve()
        path = path.parent if path.is_file() else path
        names.append(path.parent.name if path.name in ("prompts", "model") else path.name)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"Two tasks have the name {twice[0]}, which is that of their folder: rename one of the folders."
        )
    return names


def _source(folder: Path) -> Path:
    from lpt_peft._run_folder import existing_prompt_folder, model_folder

    return model_folder(folder) or existing_prompt_folder(folder)


def _lines(result: ExportResult) -> list[str]:
    deviation = result.deviation
    checked = "not compared" if deviation is None else f"logits differ by {deviation:.1e} of their size from the model"
    lines = [f"{result.file}: {checked}"]
    lines += [f"inputs   {', '.join(result.inputs)}", f"outputs  {', '.join(result.outputs)}"]
    return lines + [f"task     {result.file.parent / 'tasks' / name}.npz" for name in result.tasks]
