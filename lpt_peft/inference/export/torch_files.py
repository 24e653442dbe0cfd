"""Programs of torch.export and packages of AOTInductor: written, and opened to run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt_peft._json import dumps
from lpt_peft.errors import ExportError
from lpt_peft.inference.export.formats import DESCRIPTION, Runner, metadata, reason
from lpt_peft.inference.export.graph import Graph


def write_pt2(graph: Graph, path: Path, description: Mapping[str, Any]) -> None:
    """Write a program of torch.export, with the description as the extra file `model.json`."""
    torch.export.save(graph.program, path, extra_files={DESCRIPTION: dumps(description)})


def open_pt2(path: Path, outputs: Sequence[str]) -> Runner:
    """Open a program of torch.export."""
    return _named(torch.export.load(path).module(), outputs, torch.device("cpu"))


def write_aoti(graph: Graph, path: Path, description: Mapping[str, Any]) -> None:
    """Compile a graph by AOTInductor, for the device of its weights, and write the package.

    Args:
        graph: The graph.
        path: The file.
        description: Stored as metadata: strings, and JSON of the other values.

    Raises:
        ExportError: There is no C++ compiler, or the compilation fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                graph.program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata(description)}
            )
    except Exception as error:  # the compiler raises errors of many classes
        if any(type(cause).__name__ == "InvalidCxxCompiler" for cause in _causes(error)):
            raise ExportError(
                "An AOTInductor package is compiled, and there is no C++ compiler: install g++ (apt install g++), or "
                'name a compiler in the environment variable CXX, or export format="pt2", which needs none.'
            ) from error
        raise ExportError(
            f'AOTInductor cannot compile this model: {reason(error)}. Export format="pt2" or "onnx".'
        ) from error


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def open_aoti(path: Path, outputs: Sequence[str], device: torch.device) -> Runner:
    """Open an AOTInductor package."""
    return _named(torch._inductor.aoti_load_package(str(path)), outputs, device)


def _named(function: Callable[..., Sequence[Tensor]], outputs: Sequence[str], device: torch.device) -> Runner:
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = function(*(tensor.to(device) for tensor in inputs.values()))
        return {name: tensor.cpu() for name, tensor in zip(outputs, found, strict=True)}

    return run
