"""Export by torch.export and AOTInductor, run in processes without lpt_peft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from lpt_peft.inference import export_model
from tests.inference.digit_models import NAMES, check_results, digit_adapter, digits

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["lpt_peft", "timm"]))  # their import fails
import numpy as np, torch
extra = {"model.json": ""}
if sys.argv[1] == "pt2":
    module = torch.export.load(sys.argv[2], extra_files=extra).module()
    print(extra["model.json"])
else:
    module = torch._inductor.aoti_load_package(sys.argv[2])
    print(module.get_metadata().get("class_names", "null"))
inputs = [torch.from_numpy(array) for array in np.load(sys.argv[3]).values()]
with torch.no_grad():
    np.savez(sys.argv[4], *(output.numpy() for output in module(*inputs)))
"""


TRANSPOSED = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
package(torch.zeros(2, 32, 32, 3).permute(0, 3, 1, 2))
"""


def results_without_lpt_peft(kind, result, inputs, folder):
    """Run a file in a process in which lpt_peft cannot be imported; its outputs, and its description."""
    np.savez(folder / "inputs.npz", **inputs)
    words = [kind, result.file, folder / "inputs.npz", folder / "outputs.npz"]
    done = subprocess.run([sys.executable, "-I", "-c", WITHOUT, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as arrays:
        found = {name: torch.from_numpy(array) for name, array in zip(result.outputs, arrays.values(), strict=True)}
    return found, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("phase", "query"),
    [
        pytest.param("shared", "final", marks=pytest.mark.nightly),
        ("group", "final"),
        pytest.param("group", "block_k", marks=pytest.mark.nightly),
    ],
)
def test_torch_export(phase, query, tmp_path):
    model = digit_adapter(phase, query)
    result = export_model(model, tmp_path / "export", format="pt2")
    assert result.file.name == "model.pt2"
    assert 0 <= result.deviation < 1e-4
    images, _ = digits()
    found, description = results_without_lpt_peft("pt2", result, {"images": images.numpy()}, tmp_path)
    check_results(model, found, images)
    assert description == json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))
    assert description["class_names"] == list(NAMES)


def two_tasks(kind, folder):
    """Export two tasks, and compare both in a process without lpt_peft."""
    first, other = digit_adapter("group"), digit_adapter("group", seed=1, classes=7, pool_size=5)
    other.save_pretrained(folder / "prompts")
    result = export_model(first, folder / "export", format=kind, task="a", tasks={"b": folder / "prompts"})
    assert {path.name for path in (folder / "export" / "tasks").iterdir()} == {"a.npz", "a.json", "b.npz", "b.json"}
    images, _ = digits()
    for name, model in {"a": first, "b": other}.items():
        with np.load(folder / "export" / "tasks" / f"{name}.npz") as arrays:
            inputs = {"images": images.numpy(), **arrays}
        assert tuple(inputs) == result.inputs
        check_results(model, results_without_lpt_peft(kind, result, inputs, folder)[0], images)


@pytest.mark.nightly
def test_torch_export_of_two_tasks(tmp_path):
    two_tasks("pt2", tmp_path)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = digit_adapter("group", "block_k")
    result = export_model(model, tmp_path / "export", format="aoti")
    assert 0 <= result.deviation < 1e-4
    images, _ = digits(count=17)
    found, names = results_without_lpt_peft("aoti", result, {"images": images.numpy()}, tmp_path)
    check_results(model, found, images)
    assert names == list(NAMES)
    words = [sys.executable, "-I", "-c", TRANSPOSED, str(result.file)]
    environment = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert b"unmatched stride" in done.stderr


@needs_compiler
@pytest.mark.nightly
@pytest.mark.slow
def test_aot_inductor_of_two_tasks(tmp_path):
    two_tasks("aoti", tmp_path)


@needs_compiler
@pytest.mark.nightly
@pytest.mark.slow
def test_tensors_of_a_package_are_replaced_in_place(tmp_path):
    """Without exchangeable tasks, a package takes tensors of the same sizes by `load_constants`."""
    model = digit_adapter("shared")
    result = export_model(model, tmp_path / "export", format="aoti")
    package = torch._inductor.aoti_load_package(str(result.file))
    names = {name: f"model.{name}" for name in ("shared.prompts", "head.weight")}
    assert set(names.values()) <= set(package.get_constant_fqns())
    other = digit_adapter("shared")
    with torch.no_grad():
        other.shared.prompts.normal_()
        other.head.weight.copy_(other.head.weight.flip(0))
    tensors = {constant: other.get_parameter(name).detach() for name, constant in names.items()}
    package.load_constants(tensors, check_full_update=False, user_managed=True)
    images, _ = digits()
    with torch.no_grad():
        found = dict(zip(result.outputs, package(images), strict=True))
    check_results(other, found, images)
