"""Comparison of an exported file with the model that it was exported from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lpt_peft._numerics import cosine
from lpt_peft.errors import ExportError, LPTError
from lpt_peft.inference.export.formats import TASKS, Runner, reason
from lpt_peft.inference.export.graph import IMAGES, ExportDtype
from lpt_peft.inference.export.onnx_files import ADAPTER, read_adapter
from lpt_peft.inference.export.tasks import Model, read_inputs
from lpt_peft.router import selection_gap
from lpt_peft.vit_classifier import ViTClassifier

TOLERANCES: dict[ExportDtype, float] = {"float32": 1e-4, "float16": 5e-2}
"""Largest deviation of the logits, relative to the largest logit."""
_ROUNDING = 1e-4
_SIZES = (1, 3)
"""Batches of the verification: the batch of the file is dynamic."""


class Expected(NamedTuple):
    """Results of a model for images, on the CPU."""

    logits: Tensor
    """(B, C) float32."""
    temperature: float
    """Divisor of the logits for the probabilities."""
    groups: Tensor
    """(B, k) int64; (B, 0) without groups."""
    gap: Tensor
    """(B,) float32: difference between the similarities of ranks k and k + 1; infinite if it is not known."""


def verification_images(size: tuple[int, ...]) -> Tensor:
    """Return images of noise, (4, *size) float32, always the same."""
    return torch.randn(sum(_SIZES), *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def expected_of(model: Model, images: Tensor, temperature: float) -> Expected:
    """Compute the results of a model in float32.

    Args:
        model: In eval mode.
        images: (B, 3, H, W) float32.
        temperature: Divisor of the logits for the probabilities.
    """
    output = model(images.to(model.device), return_output=True)
    gap = images.new_full((len(images),), float("inf"))
    if output.groups.shape[1] and output.query.shape[1] and not isinstance(model, ViTClassifier):
        gap = selection_gap(cosine(output.query, model.pool.keys), model.prompt_config.top_k).cpu()
    logits = output.logits.float().cpu()
    return Expected(logits, temperature, output.groups.cpu(), gap)


def verify(
    run: Runner,
    task_inputs: Mapping[str, Tensor],
    *,
    images: Tensor,
    expected: Expected,
    dtype: ExportDtype,
    name: str,
) -> float:
    """Run a file on batches of different sizes and compare its results with those of the model.

    Images whose similarities of ranks k and k + 1 are equal within the tolerance may select other groups; they are
    left out of the comparison if they do.

    Args:
        run: The opened file.
        task_inputs: Inputs besides the images.
        images: (B, 3, H, W) float32.
        expected: Results of the model for them.
        dtype: Of the exported weights, which determines the tolerance.
        name: Of the file and task, for messages.

    Returns:
        Largest deviation of the logits, relative to the largest logit.

    Raises:
        ExportError: The results differ, or no image can be compared.
    """
    first = len(images) * _SIZES[0] // sum(_SIZES)
    parts = [run({IMAGES: part.contiguous(), **task_inputs}) for part in (images[:first], images[first:])]
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    tolerance = TOLERANCES[dtype]
    groups = found.get("groups", expected.groups)
    agree = (groups.sort(-1).values == expected.groups.sort(-1).values).all(-1)
    if bool((~agree & (expected.gap > tolerance)).any()) or not bool(agree.any()):
        row = int((~agree).nonzero()[0])
        raise ExportError(
            f"{name} selects the groups {groups[row].tolist()} for image {row} of the verification, and the model "
            f"{expected.groups[row].tolist()}: the exported file is wrong and was not kept. Report this with the "
            "versions of torch and onnxscript."
        )
    size = max(1.0, float(expected.logits.abs().max()))
    deviation = float((found["logits"] - expected.logits)[agree].abs().max()) / size
    probabilities = (found["logits"] / expected.temperature).softmax(-1)
    difference = float((found["probabilities"] - probabilities).abs().max())
    if not deviation <= tolerance or not difference <= _ROUNDING:  # NaN is refused too
        raise ExportError(
            f"{name} returns other results than the model: logits differ by {deviation:.2g} of their size, of which "
            f"{tolerance:g} is allowed, and probabilities by {difference:.2g} from the softmax of the logits. The "
            'exported file was not kept. Export dtype="float32", or report this with the versions of torch and '
            "onnxscript."
        )
    return deviation


def verify_tasks(
    run: Runner, file: Path, expected: Mapping[str | None, Expected], *, images: Tensor, dtype: ExportDtype
) -> float:
    """Compare a file with the model for every task, with the tensors that are written beside it.

    Args:
        run: The opened file.
        file: The file; its folder has the tasks.
        expected: Results of the model by the name of a task; None without exchangeable tasks.
        images: (B, 3, H, W) float32.
        dtype: Of the exported weights.

    Returns:
        Largest deviation of the logits, relative to the largest logit.

    Raises:
        ExportError: The results of a task differ.
    """
    deviations = []
    for name, results in expected.items():
        compare = partial(verify, images=images, expected=results, dtype=dtype)
        if name is None:
            deviations.append(compare(run, {}, name=file.name))
            continue
        folder = file.parent / TASKS
        deviations.append(compare(run, read_inputs(folder, name), name=f"{file.name} with the task {name}"))
        adapter = folder / f"{name}{ADAPTER}"
        if adapter.is_file():
            compare(run, read_adapter(adapter), name=f"{file.name} with {adapter.name}")
    return max(deviations)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn errors of a runtime into ExportError; `name` is that of the file."""
    try:
        yield
    except (LPTError, OSError):
        raise
    except Exception as error:  # runtimes raise errors of many classes
        raise ExportError(
            f"{name} was written, but cannot be run: {reason(error)}. The exported file was not kept. "
            "Export another format, or report this with the versions of torch, onnxscript and onnxruntime."
        ) from error
