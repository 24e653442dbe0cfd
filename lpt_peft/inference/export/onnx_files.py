"""ONNX files: written, and run by onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt_peft.errors import ExportError, MissingExtraError
from lpt_peft.inference.export.formats import metadata, reason
from lpt_peft.inference.export.graph import Graph

ADAPTER = ".onnx_adapter"
"""Ending of the adapter files."""
EXTRA = 'pip install "lpt_peft[export]"'


def require_onnx() -> None:
    """Raise MissingExtraError if onnx or onnxscript is not installed."""
    try:
        import onnx  # noqa: F401, PLC0415 - an optional extra
        import onnxscript  # noqa: F401, PLC0415 - an optional extra
    except ImportError as error:
        raise MissingExtraError(f"The export to ONNX needs {error.name}: {EXTRA}.") from error


def write_onnx(graph: Graph, path: Path, description: Mapping[str, Any]) -> None:
    """Write an ONNX file, with `path`.data beside it if the weights are too large for a single file (1.5 GiB).

    Args:
        graph: Of a model on the CPU.
        path: The file.
        description: Stored as metadata: strings, and JSON of the other values.

    Raises:
        ExportError: The graph has an operation that ONNX does not have.
        OSError: The disk is full.
    """
    try:
        with _quiet():
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
        raise ExportError(
            f'The conversion to ONNX failed: {reason(error)}. Export format="pt2", which has all '
            "operations of torch, or use a backbone whose export to ONNX is supported: docs/backbones.md."
        ) from error
    assert written is not None  # noqa: S101 - with dynamo=True; narrows the type
    model = written.model
    model.metadata_props.update(metadata(description))
    for node in model.graph:  # stack traces, with paths of this machine
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    written.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings and log lines of the exporter, which concern its own rules."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class OnnxSession:
    """An ONNX file in onnxruntime on the CPU: a `Runner`.

    Args:
        path: The file.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime  # noqa: PLC0415 - an optional extra

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute all outputs."""
        found = self._session.run(self._outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self._outputs, found, strict=True)}


def write_adapter(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Write inputs of a graph in the adapter format of onnxruntime, which its C, C++ and C# interfaces read.

    Args:
        path: The file.
        inputs: float32 on the CPU, of at least one dimension.
    """
    import onnxruntime  # noqa: PLC0415 - an optional extra

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in inputs.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(path.absolute()))


def read_adapter(path: Path) -> dict[str, Tensor]:
    """Read the inputs of a graph from an adapter file."""
    import onnxruntime  # noqa: PLC0415 - an optional extra

    found = onnxruntime.AdapterFormat.read_adapter(str(path.absolute())).get_parameters()
    return {name: torch.from_numpy(value.numpy()).clone() for name, value in found.items()}
