"""Errors of exports: arguments, models, tasks, missing libraries, files with other results; nothing is left behind."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from lpt_peft.errors import (
    BackboneMismatchError,
    ConfigError,
    ExportError,
    InputError,
    MissingExtraError,
    PromptFileNotFoundError,
    StateError,
)
from lpt_peft.inference import export_model
from lpt_peft.inference.export.graph import export_graph, inference_copy
from lpt_peft.inference.export.tasks import task_of
from tests.inference.digit_models import digit_adapter, digit_classifier, digits

MODULE = sys.modules[export_model.__module__]


@pytest.fixture(scope="module")
def graph():
    """The graph of a linear probe."""
    model = inference_copy(digit_classifier("linear_probe"), "float32")
    return export_graph(model, task_of(model), swappable=False)


@pytest.fixture
def without_tracing(graph, monkeypatch):
    monkeypatch.setattr(MODULE, "export_graph", lambda *args, **kwargs: graph)


def refused(folder, error, message, model, **options):
    """Check the error of an export, and that it leaves nothing behind."""
    with pytest.raises(error) as caught:
        export_model(model, folder / "export", **{"format": "pt2", **options})
    assert message in str(caught.value)
    assert [path.name for path in folder.iterdir() if path.name.startswith("export")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, 'format=\'tflite\' must be "onnx", "pt2" or "aoti"'),
        ({"dtype": "int8"}, 'dtype=\'int8\' must be "float32" or "float16"'),
        ({"device": "meta"}, 'is for format="aoti": pt2 files run on any device'),
        ({"format": "aoti", "device": "abacus"}, "device='abacus' is not available"),
        ({"tasks": {"a": "prompts"}}, "name the model's own task by task="),
        ({"task": "a", "tasks": {"a": "prompts"}}, "Two tasks have the name 'a'"),
        ({"task": "a/b"}, "'a/b' must be the name of a file"),
        ({"task": ".a"}, "'.a' must be the name of a file"),
        ({"task": ""}, "'' must be the name of a file"),
    ],
)
def test_arguments(options, message, tmp_path):
    refused(tmp_path, ConfigError, message, digit_classifier("linear_probe"), **options)


def test_existing_folders_and_links_are_refused(tmp_path):
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="exists already: give the path of a new folder"):
            export_model(digit_classifier("linear_probe"), folder)
    assert (tmp_path / "notes").read_text() == "kept"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: digit_adapter("shared"), "b has phase='shared', and the exported graph phase='group'"),
        (lambda: digit_adapter("group", prompt_length=4), "b has prompt_length=4, and the exported graph prompt_len"),
        (lambda: digit_adapter("group", top_k=3), "b has top_k=3, and the exported graph top_k=2"),
        (lambda: digit_adapter("group", shared_layers=0), "b has shared_layers=0, and the exported graph shared_la"),
        (lambda: digit_adapter("group", "block_k"), "b has query='block_k', and the exported graph query='final'"),
    ],
)
def test_tasks_of_another_graph(other, message, tmp_path):
    other().save_pretrained(tmp_path / "prompts")
    refused(tmp_path, InputError, message, digit_adapter("group"), task="a", tasks={"b": tmp_path / "prompts"})


def test_tasks_of_another_image_size(tmp_path):
    other = digit_adapter("shared")
    other.metadata = replace(other.metadata, preprocess={"input_size": (3, 64, 64)})
    other.save_pretrained(tmp_path / "prompts")
    message = (
        "b has input_size=[3, 64, 64], and the exported graph input_size=[3, 32, 32]: tasks of a graph differ only"
    )
    refused(tmp_path, InputError, message, digit_adapter("shared"), task="a", tasks={"b": tmp_path / "prompts"})


def test_tasks_of_another_backbone_and_missing_tasks(tmp_path):
    model = digit_adapter("shared")
    missing = {"b": tmp_path / "nowhere"}
    refused(tmp_path, PromptFileNotFoundError, "nowhere does not exist", model, task="a", tasks=missing)
    probe = digit_classifier("linear_probe")
    refused(tmp_path, PromptFileNotFoundError, "nowhere does not exist", probe, task="a", tasks=missing)
    with torch.no_grad():
        model.vit.norm.weight += 0.1
    model.save_pretrained(tmp_path / "prompts")
    tasks = {"b": tmp_path / "prompts"}
    refused(tmp_path, BackboneMismatchError, "", digit_adapter("shared"), task="a", tasks=tasks)


def test_models_without_prompts_as_tasks(tmp_path):
    full, probe = digit_classifier("full"), digit_classifier("linear_probe")
    message = "Full fine-tuning has other weights of the ViT for each task"
    refused(tmp_path, ConfigError, message, full, task="a")
    full.save_pretrained(tmp_path / "model")
    digit_adapter("shared").save_pretrained(tmp_path / "prompts")
    message = "only linear probes on the same backbone share a graph"
    for folder, trained in {"model": "by full", "prompts": "with prompts"}.items():
        tasks = {"b": tmp_path / folder}
        refused(tmp_path, InputError, f"was trained {trained}, or", probe, task="a", tasks=tasks)
        refused(tmp_path, InputError, message, probe, task="a", tasks=tasks)
    tasks = {"b": tmp_path / "model"}
    refused(tmp_path, PromptFileNotFoundError, "has no prompts", digit_adapter("shared"), task="a", tasks=tasks)


def test_routes_that_a_graph_does_not_have(tmp_path):
    model = digit_adapter("group")
    model.fit_router(digits("train", 120)[0], progress=False)
    model.route = 0.02
    refused(tmp_path, ConfigError, "The route is a margin (0.02)", model)
    model.route = "router"
    refused(tmp_path, ConfigError, "A router belongs to the prompts of a task", model, task="a")


def test_an_unwrapped_model(tmp_path):
    model = digit_adapter("shared")
    model.unwrap()
    refused(tmp_path, StateError, "was unwrapped", model)


def test_a_graph_that_cannot_be_traced(tmp_path):
    model = digit_adapter("shared")
    model.vit.norm.forward = lambda x: x * float(x.mean())
    refused(tmp_path, ExportError, "torch.export cannot trace this VisionTransformer", model)


@pytest.mark.nightly
def test_an_operation_that_onnx_does_not_have(tmp_path):
    pytest.importorskip("onnxscript")
    model = digit_classifier("linear_probe")
    model.vit.norm.forward = lambda x: x * torch.special.i0(x)
    refused(tmp_path, ExportError, 'Export format="pt2", which has all operations', model, format="onnx")


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_missing_exporter(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    message = f'needs {library}: pip install "lpt_peft[export]"'
    refused(tmp_path, MissingExtraError, message, digit_classifier("linear_probe"), format="onnx")


@pytest.mark.nightly
def test_without_onnxruntime_the_file_is_kept_with_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="was not run and compared with the model: onnxruntime is not installed"):
        result = export_model(digit_classifier("linear_probe"), tmp_path / "export", task="a")
    assert result.deviation is None
    assert result.to_dict()["deviation"] is None
    assert result.file.is_file()
    assert {path.name for path in (tmp_path / "export" / "tasks").iterdir()} == {"a.npz", "a.json"}


def test_no_compiler(tmp_path, without_tracing):
    from torch._inductor import config  # noqa: PLC0415 - takes long to import

    message = "no C++ compiler: install g++"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        refused(tmp_path, ExportError, message, digit_classifier("linear_probe"), format="aoti")


def test_a_compiler_that_fails(tmp_path, monkeypatch, without_tracing):
    def fail(*args, **kwargs):
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    message = 'AOTInductor cannot compile this model: C++ compile error. Export format="pt2" or "onnx".'
    refused(tmp_path, ExportError, message, digit_classifier("linear_probe"), format="aoti")


def test_a_file_with_other_results_is_not_kept(tmp_path, without_tracing):
    model = digit_classifier("linear_probe")
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    refused(tmp_path, ExportError, "returns other results than the model: logits differ", model)


def test_a_file_that_cannot_be_run(tmp_path, monkeypatch, without_tracing):
    def fail(*args):
        raise RuntimeError("Unsupported\nopset.")

    monkeypatch.setattr(MODULE, "open_pt2", fail)
    message = "model.pt2 was written, but cannot be run: Unsupported opset. The exported file was not kept"
    refused(tmp_path, ExportError, message, digit_classifier("linear_probe"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["write_pt2", "verify_tasks"])
def test_nothing_is_kept_after_an_interruption(step, stop, tmp_path, monkeypatch, without_tracing):
    original = getattr(MODULE, step)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise stop

    monkeypatch.setattr(MODULE, step, interrupted)
    with pytest.raises(type(stop)):
        export_model(digit_classifier("linear_probe"), tmp_path / "new" / "export", format="pt2")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
