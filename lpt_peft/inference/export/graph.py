"""The function that is exported: images to logits, probabilities and groups.

Either the trained tensors are constants, or they are inputs, so that a graph answers many tasks. Not here: files
(`formats.py`).
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from lpt_peft._numerics import at_least_float32
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.errors import ConfigError, ExportError, LPTError, StateError
from lpt_peft.heads import cosine_logits
from lpt_peft.inference.export.formats import reason
from lpt_peft.inference.export.tasks import Model, Task
from lpt_peft.vit_classifier import ViTClassifier

ExportDtype = Literal["float32", "float16"]
DTYPES: tuple[ExportDtype, ...] = get_args(ExportDtype)
IMAGES = "images"
_TRACED_BATCH, _TRACED_CLASSES = 2, 3  # sizes of 0 and 1 would become constants


class Graph(NamedTuple):
    """A program and the names of what it takes and returns."""

    program: ExportedProgram
    inputs: list[str]
    """`images` (B, 3, H, W) float32; the inputs of `Task.inputs` follow in a graph with exchangeable tasks."""
    outputs: list[str]
    """`logits` (B, C) float32, `probabilities` (B, C) float32, and in phase "group" `groups` (B, k) int64."""
    dynamic_shapes: Any
    """The argument of torch.export, for names of dimensions."""


class FixedGraph(nn.Module):
    """A model with its trained tensors as constants.

    Args:
        model: In eval mode.
        temperature: Divisor of the logits for the probabilities.
    """

    def __init__(self, model: Model, temperature: float) -> None:
        super().__init__()
        self.model = model
        self._temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits, probabilities and, if there are any, groups."""
        output = self.model(images, return_output=True)
        return _results(output.logits, self._temperature, output.groups)


class SwappableGraph(nn.Module):
    """A model that takes its trained tensors as arguments.

    Args:
        model: In eval mode.
        names: Names of the tensors; `head.weight` is the last.
    """

    def __init__(self, model: Model, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self._names = names

    def forward(self, images: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return logits, probabilities and, if there are any, groups; `inputs` in the order of `Task.inputs`."""
        *tensors, scale, temperature = inputs
        given = dict(zip(self._names, tensors, strict=True))
        output = functional_call(self.model, given, (images,), {"return_output": True})
        logits = scale * cosine_logits(output.features, tensors[-1], 1.0)
        return _results(logits, temperature, output.groups)


def inference_copy(model: Model, dtype: ExportDtype, device: str = "cpu") -> Model:
    """Copy a model for inference: eval mode, frozen, the ViT in `dtype`, prompts and head in float32."""
    copied = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    target = getattr(torch, dtype)
    if any(weight.dtype != target for weight in copied.vit.parameters() if weight.is_floating_point()):
        copied.frozen_weights.cast(target)
    for name, parameter in copied.named_parameters():
        if not name.startswith("vit."):
            parameter.data = parameter.data.float()
    return copied


def export_graph(model: Model, task: Task, *, swappable: bool) -> Graph:
    """Trace a model of `inference_copy` by torch.export, with a dynamic batch.

    Args:
        model: The model.
        task: Its task.
        swappable: Make the trained tensors inputs, with a dynamic number of classes and groups.

    Raises:
        ExportError: torch.export fails.
    """
    has_groups = isinstance(model, LongTailPromptAdapter) and model.phase == "group"
    device = next(model.vit.parameters()).device
    images = torch.zeros(_TRACED_BATCH, *task.preprocess["input_size"])
    batch, classes = {0: Dim("batch")}, {0: Dim("classes")}
    module: nn.Module = FixedGraph(model, task.temperature)
    arguments: list[Tensor] = [images]
    dynamic_shapes: Any = {IMAGES: batch}
    inputs = [IMAGES]
    if swappable:
        module = SwappableGraph(model, list(task.tensors))
        inputs += task.inputs()
        sizes: dict[str, tuple[int, Any]] = {"head.weight": (_TRACED_CLASSES, classes)}
        if isinstance(model, LongTailPromptAdapter) and model.phase == "group":
            top_k = model.prompt_config.top_k
            groups = {0: Dim("pool_size", min=top_k)}
            sizes |= dict.fromkeys(("pool.prompts", "pool.keys"), (top_k + 2, groups))
        shapes: list[Any] = []
        for name, tensor in task.inputs().items():
            length, shape = sizes.get(name, (None, None))
            arguments.append(tensor if length is None else torch.randn(length, *tensor.shape[1:]))
            shapes.append(shape)
        dynamic_shapes = {IMAGES: batch, "inputs": tuple(shapes)}
    given = tuple(argument.to(device) for argument in arguments)
    try:
        with torch.no_grad():
            program = torch.export.export(module, given, dynamic_shapes=dynamic_shapes, strict=False)
    except LPTError:
        raise
    except Exception as error:  # torch.export raises errors of many classes
        raise ExportError(
            f"torch.export cannot trace this {type(model.vit).__name__}: {reason(error)}. Use a backbone "
            "whose export is supported: docs/backbones.md."
        ) from error
    outputs = ["logits", "probabilities", *(["groups"] if has_groups else [])]
    return Graph(program, inputs, outputs, dynamic_shapes)


def check_exportable(model: Model, *, swappable: bool) -> None:
    """Refuse models without a graph.

    Args:
        model: The model.
        swappable: Whether the trained tensors are inputs.

    Raises:
        StateError: The model was unwrapped.
        ConfigError: The route or the method of the model excludes the graph.
    """
    if "vit" not in dict(model.named_children()):
        raise StateError(f"This {type(model).__name__} was unwrapped and cannot be exported: wrap the ViT again.")
    if isinstance(model, ViTClassifier):
        if swappable and model.method == "full":
            raise ConfigError(
                "Full fine-tuning has other weights of the ViT for each task, so its tasks cannot share a graph: "
                "export each without swappable."
            )
    elif model.phase == "group" and model.route != "exact":
        if model.route != "router":
            raise ConfigError(
                f"The route is a margin ({model.route:g}), by which a batch takes one pass or two, and a graph has no "
                'such choice: set adapter.route to "exact" or "router" before the export.'
            )
        if swappable:
            raise ConfigError(
                "A router belongs to the prompts of a task and cannot be an input of the graph: set adapter.route = "
                '"exact" before a swappable export.'
            )


def _results(logits: Tensor, temperature: float | Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    logits = at_least_float32(logits)
    results = (logits, (logits / temperature).softmax(-1))
    return (*results, groups) if groups.shape[1] else results
