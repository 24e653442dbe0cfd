"""Export to ONNX of backbones of every library, with two tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpt_peft.inference import export_model
from tests.backbones.models import build, rows

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.nightly


@rows
def test_backbones_of_every_library_answer_two_tasks(row, tmp_path):
    first, other = (build(row, "group").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in (other.shared.prompts, other.pool.prompts, other.head.weight):
            parameter.copy_(parameter.flip(0))
    other.save_pretrained(tmp_path / "prompts")
    result = export_model(first, tmp_path / "export", task="a", tasks={"b": tmp_path / "prompts"})
    session = onnxruntime.InferenceSession(str(result.file))
    batch = torch.randn(3, *first.preprocess()["input_size"])
    for name, model in {"a": first, "b": other}.items():
        with torch.no_grad():
            expected = model(batch, return_output=True)
        arrays = np.load(tmp_path / "export" / "tasks" / f"{name}.npz")
        logits, _, groups = session.run(None, {"images": batch.numpy(), **arrays})
        assert (torch.from_numpy(logits) - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()
        assert groups.tolist() == expected.groups.tolist()
