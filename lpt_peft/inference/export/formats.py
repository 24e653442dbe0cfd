"""Files of an exported graph: written, and opened to run them.

Not here: the comparison with the model (`verify.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lpt_peft._json import dumps
from lpt_peft._text import printable
from lpt_peft.errors import ExportError, MissingExtraError
from lpt_peft.inference.export.graph import Graph

ExportFormat = Literal["onnx", "pt2", "aoti"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
FILE_NAMES: dict[ExportFormat, str] = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.pt2"}
DESCRIPTION = "model.json"
"""Name of the description, beside the graph and, for torch.export, inside its file."""
EXTRA = 'pip install "lpt_peft[export]"'

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Runs a file: tensors by the names of inputs, on the CPU, to tensors by the names of outputs."""


def write_onnx(graph: Graph, path: Path, description: Mapping[str, Any]) -> None:
    """Write an ONNX file, with `path`.data beside it for more than 2 GB of weights.

    Args:
        graph: Of a model on the CPU.
        path: The file.
        description: Stored as metadata: strings, and JSON of the other values.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The graph has an operation that ONNX does not have.
    """
    require_onnx()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many kinds, about the exporter itself
            written = torch.onnx.export(
                graph.program,
                (),
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=graph.dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many classes
        raise ExportError(f"The conversion to ONNX failed: {printable(str(error), 300)}") from error
    assert written is not None  # noqa: S101 - with dynamo=True; narrows the type
    model = written.model
    for key, value in description.items():
        model.metadata_props[key] = value if isinstance(value, str) else dumps(value)
    for node in model.graph:  # stack traces, with paths of this machine
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    written.save(path)


def require_onnx() -> None:
    """Raise MissingExtraError if onnx or onnxscript is not installed."""
    try:
        import onnx  # noqa: F401, PLC0415 - an optional extra
        import onnxscript  # noqa: F401, PLC0415 - an optional extra
    except ImportError as error:
        raise MissingExtraError(f"The export to ONNX needs {error.name}: {EXTRA}.") from error


def open_onnx(path: Path) -> Runner | None:
    """Open an ONNX file by onnxruntime on the CPU; None if onnxruntime is not installed."""
    try:
        import onnxruntime  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    return run


def write_pt2(graph: Graph, path: Path, description: Mapping[str, Any]) -> None:
    """Write a program of torch.export, with the description as the extra file `model.json`."""
    torch.export.save(graph.program, path, extra_files={DESCRIPTION: dumps(description)})


def open_pt2(path: Path, outputs: Sequence[str]) -> Runner:
    """Open a program of torch.export."""
    module = torch.export.load(path).module()
    return _named(module, outputs, torch.device("cpu"))


def write_aoti(graph: Graph, path: Path) -> None:
    """Compile a graph by AOTInductor, for the device of its weights, and write the package.

    Raises:
        ExportError: There is no C++ compiler, or the compilation fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(graph.program, package_path=str(path))
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)  # type: ignore[arg-type]
        if any(type(cause).__name__ == "InvalidCxxCompiler" for cause in causes):
            raise ExportError(
                "An AOTInductor package is compiled, and there is no C++ compiler: install g++ (apt install g++), or "
                'name a compiler in the environment variable CXX, or export format="pt2", which needs none.'
            ) from error
        raise ExportError(f"AOTInductor cannot compile this model: {printable(str(error), 300)}") from error


def open_aoti(path: Path, outputs: Sequence[str], device: torch.device) -> Runner:
    """Open an AOTInductor package."""
    return _named(torch._inductor.aoti_load_package(str(path)), outputs, device)


def _named(function: Callable[..., Sequence[Tensor]], outputs: Sequence[str], device: torch.device) -> Runner:
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = function(*(tensor.to(device) for tensor in inputs.values()))
        return {name: tensor.cpu() for name, tensor in zip(outputs, found, strict=True)}

    return run
