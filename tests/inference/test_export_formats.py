"""Export by torch.export and AOTInductor, and errors of every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lpt_peft.errors import (
    BackboneMismatchError,
    ConfigError,
    ExportError,
    InputError,
    LPTError,
    MissingExtraError,
    PromptFileNotFoundError,
)
from lpt_peft.inference import export_model
from lpt_peft.inference.export import formats
from tests.inference.digit_models import digit_adapter, digit_classifier, digits

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["lpt_peft", "timm"]))  # their import fails
import numpy as np, torch
extra = {"model.json": ""}
if sys.argv[1] == "pt2":
    module = torch.export.load(sys.argv[2], extra_files=extra).module()
else:
    module = torch._inductor.aoti_load_package(sys.argv[2])
inputs = [torch.from_numpy(array) for array in np.load(sys.argv[3]).values()]
with torch.no_grad():
    np.savez(sys.argv[4], *(output.numpy() for output in module(*inputs)))
print(extra["model.json"])
"""


def outputs_without_lpt_peft(kind, file, inputs, folder):
    """Run a file in a process in which lpt_peft cannot be imported; its outputs, and its description."""
    np.savez(folder / "inputs.npz", **inputs)
    words = [kind, file, folder / "inputs.npz", folder / "outputs.npz"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(array) for array in np.load(folder / "outputs.npz").values()], done.stdout.decode()


@torch.no_grad()
def check_against(model, found, images):
    output = model(images, return_output=True)
    assert (found[0] - output.logits).abs().max() < 1e-4 * output.logits.abs().max()
    torch.testing.assert_close(found[1], (output.logits / model.metadata.temperature).softmax(1), atol=1e-3, rtol=0)
    assert len(found) == (3 if output.groups.shape[1] else 2)
    if output.groups.shape[1]:
        assert torch.equal(found[2], output.groups)


@pytest.mark.parametrize(("phase", "query"), [("shared", "final"), ("group", "final"), ("group", "block_k")])
def test_torch_export(phase, query, tmp_path):
    model = digit_adapter(phase, query)
    result = export_model(model, tmp_path / "export", format="pt2")
    assert result.file.name == "model.pt2"
    assert 0 <= result.deviation < 1e-4
    images, _ = digits()
    found, description = outputs_without_lpt_peft("pt2", result.file, {"images": images.numpy()}, tmp_path)
    check_against(model, found, images)
    assert json.loads(description) == json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))


def test_torch_export_of_two_tasks(tmp_path):
    first, other = digit_adapter("group"), digit_adapter("group", seed=1, classes=7, pool_size=5)
    other.save_pretrained(tmp_path / "prompts")
    result = export_model(first, tmp_path / "export", format="pt2", task="a", tasks={"b": tmp_path / "prompts"})
    images, _ = digits()
    for name, model in {"a": first, "b": other}.items():
        inputs = {"images": images.numpy(), **np.load(tmp_path / "export" / "tasks" / f"{name}.npz")}
        assert tuple(inputs) == result.inputs
        check_against(model, outputs_without_lpt_peft("pt2", result.file, inputs, tmp_path)[0], images)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = digit_adapter("group", "block_k")
    result = export_model(model, tmp_path / "export", format="aoti")
    assert 0 <= result.deviation < 1e-4
    images, _ = digits()
    found, _ = outputs_without_lpt_peft("aoti", result.file, {"images": images.numpy()}, tmp_path)
    check_against(model, found, images)


def test_no_compiler(tmp_path, monkeypatch):
    from torch._inductor import config  # noqa: PLC0415 - takes long to import

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ExportError, match="no C\\+\\+ compiler: install g\\+\\+"):
        export_model(digit_adapter("shared"), tmp_path / "export", format="aoti")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_results_is_not_kept(tmp_path, monkeypatch):
    """The graph of another seed in place of the graph of the model."""
    other = digit_adapter("shared", seed=5)
    original = formats.write_pt2

    def write_other(graph, path, description):
        model = formats.torch.export.export(Wrapped(other), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=BATCH)
        original(graph._replace(program=model), path, description)

    monkeypatch.setattr(formats, "write_pt2", write_other)
    with pytest.raises(ExportError, match="returns other results than the model: logits differ"):
        export_model(digit_adapter("shared"), tmp_path / "export", format="pt2")
    assert list(tmp_path.iterdir()) == []


BATCH = ({0: torch.export.Dim("batch")},)


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        logits = self.model(images)
        return logits, (logits / 0.7).softmax(1)


def test_a_graph_that_cannot_be_traced(tmp_path, monkeypatch):
    model = digit_adapter("shared")
    model.vit.norm.forward = lambda x: x * float(x.mean())
    with pytest.raises(ExportError, match="torch.export cannot trace this VisionTransformer"):
        export_model(model, tmp_path / "export", format="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_missing_exporter(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"needs {library}: pip install \"lpt_peft\[export\]\""):
        export_model(digit_adapter("shared"), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_onnxruntime_the_file_is_kept_with_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="was not run and compared with the model: onnxruntime is not installed"):
        result = export_model(digit_classifier("linear_probe"), tmp_path / "export")
    assert result.deviation is None
    assert result.file.is_file()
    assert result.to_dict()["deviation"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, 'format=\'tflite\' must be "onnx", "pt2" or "aoti"'),
        ({"dtype": "int8"}, 'dtype=\'int8\' must be "float32" or "float16"'),
        ({"format": "pt2", "device": "cuda"}, 'is for format="aoti": pt2 files run on any device'),
        ({"tasks": {"a": "prompts"}}, "name the model's own task by task="),
        ({"task": "a", "tasks": {"a": "prompts"}}, "Two tasks have the name 'a'"),
        ({"task": "a/b"}, "'a/b' must be the name of a file"),
        ({"task": ".a"}, "'.a' must be the name of a file"),
    ],
)
def test_arguments(options, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        export_model(digit_adapter("shared"), tmp_path / "export", **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(ConfigError, match="exists already: give the path of a new folder"):
        export_model(digit_adapter("shared"), tmp_path)
    assert (tmp_path / "notes").read_text() == "kept"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: digit_adapter("shared"), "b has phase='shared', and the exported graph phase='group'"),
        (lambda: digit_adapter("group", prompt_length=4), "b has prompt_length=4, and the exported graph prompt_len"),
        (lambda: digit_adapter("group", top_k=3), "b has top_k=3, and the exported graph top_k=2"),
        (lambda: digit_adapter("group", shared_layers=4), "b has shared_layers=4, and the exported graph"),
        (lambda: digit_adapter("group", "block_k"), "b has query='block_k', and the exported graph query='final'"),
    ],
)
def test_tasks_of_another_graph(other, message, tmp_path):
    other().save_pretrained(tmp_path / "prompts")
    with pytest.raises(InputError, match="Export this task separately") as caught:
        export_model(
            digit_adapter("group"), tmp_path / "export", format="pt2", task="a", tasks={"b": tmp_path / "prompts"}
        )
    assert message in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_tasks_of_another_backbone_and_missing_tasks(tmp_path):
    model = digit_adapter("shared")
    with pytest.raises(PromptFileNotFoundError):
        export_model(model, tmp_path / "export", format="pt2", task="a", tasks={"b": tmp_path / "nowhere"})
    with torch.no_grad():
        model.vit.norm.weight += 0.1
    model.save_pretrained(tmp_path / "prompts")
    with pytest.raises(BackboneMismatchError):
        export_model(
            digit_adapter("shared"), tmp_path / "export", format="pt2", task="a", tasks={"b": tmp_path / "prompts"}
        )
    assert not (tmp_path / "export").exists()


def test_models_without_prompts_as_tasks(tmp_path):
    full = digit_classifier("full")
    with pytest.raises(ConfigError, match="Full fine-tuning has other weights of the ViT for each task"):
        export_model(full, tmp_path / "export", format="pt2", task="a")
    full.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="only linear probes on the same backbone share a graph"):
        export_model(
            digit_classifier("linear_probe"),
            tmp_path / "export",
            format="pt2",
            task="a",
            tasks={"b": tmp_path / "model"},
        )


def test_routes_that_a_graph_does_not_have(tmp_path):
    model = digit_adapter("group")
    model.fit_router(digits("train", 120)[0], progress=False)
    model.route = 0.02
    with pytest.raises(ConfigError, match="The route is a margin \\(0.02\\)"):
        export_model(model, tmp_path / "export", format="pt2")
    model.route = "router"
    with pytest.raises(ConfigError, match="A router belongs to the prompts of a task"):
        export_model(model, tmp_path / "export", format="pt2", task="a")


def test_an_unwrapped_model(tmp_path):
    model = digit_adapter("shared")
    model.unwrap()
    with pytest.raises(LPTError, match="was unwrapped"):
        export_model(model, tmp_path / "export", format="pt2")
    assert not Path(tmp_path / "export").exists()
