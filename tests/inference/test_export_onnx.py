"""Export to ONNX: digits through onnxruntime, with constants and with exchangeable tasks, without lpt_peft."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.inference import export_model
from lpt_peft.inference.export.onnx_files import read_adapter
from tests.inference.digit_models import NAMES, check_results, digit_adapter, digit_classifier, digits

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CASES = {
    "shared": lambda: digit_adapter("shared"),
    "group, final": lambda: digit_adapter("group", "final"),
    "group, block_k": lambda: digit_adapter("group", "block_k"),
    "shallow": lambda: digit_adapter("shared", placement="shallow"),
    "linear_probe": lambda: digit_classifier("linear_probe"),
    "full": lambda: digit_classifier("full"),
}
NIGHTLY = ("shared", "shallow", "linear_probe", "full")
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.nightly if case in NIGHTLY else ()) for case in CASES]
)


def session_of(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run(session, **inputs):
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, inputs)
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


@cases
def test_digits_get_the_logits_of_the_model(case, tmp_path, capfd, caplog):
    model = CASES[case]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    with caplog.at_level(logging.WARNING):
        result = export_model(model, tmp_path / "export", progress=steps.append)
    assert steps == ["tracing VisionTransformer", "converting to ONNX", "comparing the file with the model"]
    assert capfd.readouterr() == ("", ""), "the exporter prints nothing"
    assert [record for record in caplog.records if record.name.startswith("onnx")] == []
    assert result.file == tmp_path / "export" / "model.onnx"
    assert 0 <= result.deviation < 1e-4
    assert result.inputs == ("images",)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert {path.name for path in result.file.parent.iterdir()} == {"model.onnx", "model.json"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is unchanged"

    session = session_of(result.file)
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert [output.name for output in session.get_outputs()] == list(result.outputs)
    images, _ = digits()
    for batch in (1, 17, len(images)):
        check_results(model, run(session, images=images[:batch].numpy()), images[:batch])

    metadata = session.get_modelmeta().custom_metadata_map
    description = json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))
    assert description["class_names"] == json.loads(metadata["class_names"]) == list(NAMES)
    assert description["preprocess"] == json.loads(metadata["preprocess"])
    assert description["preprocess"]["mean"] == list(model.preprocess()["mean"])
    assert float(metadata["temperature"]) == description["temperature"] == model.metadata.temperature
    assert metadata["fingerprint"] == description["fingerprint"] == model.fingerprint
    expected = ("prompts", model.phase) if isinstance(model, LongTailPromptAdapter) else (model.method, None)
    assert (metadata["method"], metadata.get("phase")) == (description["method"], description.get("phase")) == expected
    assert b"/lpt_peft/" not in result.file.read_bytes(), "the file holds no paths of this machine"


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Models by the names of their tasks, and their export: other classes, groups, logit scale and temperature."""
    folder = tmp_path_factory.mktemp("tasks")
    models = {
        "ten": digit_adapter("group"),
        "seven": digit_adapter("group", seed=1, classes=7, pool_size=5, temperature=2.0),
        "one": digit_adapter("group", seed=2, classes=1, pool_size=2),
    }
    for name in ("seven", "one"):
        models[name].save_pretrained(folder / name)
    tasks = {name: folder / name for name in ("seven", "one")}
    return models, export_model(models["ten"], folder / "export", task="ten", tasks=tasks)


def test_a_session_answers_all_tasks(two_tasks):
    models, result = two_tasks
    assert result.tasks == ("ten", "seven", "one")
    assert result.inputs[1:] == (
        "shared.prompts",
        "pool.prompts",
        "pool.keys",
        "head.weight",
        "logit_scale",
        "temperature",
    )
    assert 0 <= result.deviation < 1e-4
    session = session_of(result.file)
    images, _ = digits()
    for name in ("ten", "seven", "ten", "one"):
        with np.load(result.file.parent / "tasks" / f"{name}.npz") as arrays:
            assert arrays.files == list(result.inputs[1:])
            inputs = dict(arrays)
        found = run(session, images=images.numpy(), **inputs)
        check_results(models[name], found, images)
        about = json.loads((result.file.parent / "tasks" / f"{name}.json").read_text("utf-8"))
        assert about["class_names"] == list(NAMES[: found["logits"].shape[1]])
        assert about["temperature"] == models[name].metadata.temperature == inputs["temperature"]
        assert about["preprocess"]["input_size"] == [3, 32, 32]
    assert (found["probabilities"] == 1).all(), "of the single class"
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["head.weight"][0] == "classes"
    assert shapes["pool.keys"][0] == shapes["pool.prompts"][0] == "pool_size"
    assert shapes["logit_scale"] == shapes["temperature"] == [1]
    metadata = session.get_modelmeta().custom_metadata_map
    assert "class_names" not in metadata
    assert json.loads(metadata["inputs"]) == list(result.inputs)
    assert json.loads(metadata["input_size"]) == [3, 32, 32]


def test_a_call_without_a_task_is_refused(two_tasks):
    images, _ = digits(count=2)
    with pytest.raises(ValueError, match="Required inputs .*shared.prompts.* are missing"):
        run(session_of(two_tasks[1].file), images=images.numpy())


def test_adapter_files_of_onnxruntime(two_tasks):
    """`session.run` checks inputs before it applies adapters, so the session below it is called."""
    models, result = two_tasks
    session = session_of(result.file)
    images, _ = digits()
    names = [output.name for output in session.get_outputs()]
    for name in ("ten", "seven"):
        file = result.file.parent / "tasks" / f"{name}.onnx_adapter"
        with np.load(file.with_suffix(".npz")) as arrays:
            inputs = dict(arrays)
        assert {key: value.tolist() for key, value in read_adapter(file).items()} == {
            key: value.tolist() for key, value in inputs.items()
        }
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(file))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        found = session._sess.run(names, {"images": images.numpy()}, options)
        found = {key: torch.from_numpy(value) for key, value in zip(names, found, strict=True)}
        check_results(models[name], found, images)


@pytest.mark.nightly
def test_tasks_of_the_query_of_block_k(tmp_path):
    first, other = digit_adapter("group", "block_k"), digit_adapter("group", "block_k", seed=1, classes=7, pool_size=5)
    other.save_pretrained(tmp_path / "prompts")
    result = export_model(first, tmp_path / "export", task="a", tasks={"b": tmp_path / "prompts"})
    session = session_of(result.file)
    images, _ = digits()
    for name, model in {"a": first, "b": other}.items():
        arrays = np.load(tmp_path / "export" / "tasks" / f"{name}.npz")
        check_results(model, run(session, images=images.numpy(), **arrays), images)


@pytest.mark.nightly
def test_linear_probes_share_a_graph(tmp_path):
    first, other = digit_classifier("linear_probe"), digit_classifier("linear_probe", classes=6, temperature=0.5)
    other.save_pretrained(tmp_path / "model")
    result = export_model(first, tmp_path / "export", task="a", tasks={"b": tmp_path / "model"})
    assert result.inputs == ("images", "head.weight", "logit_scale", "temperature")
    session = session_of(result.file)
    images, _ = digits()
    for name, model in {"a": first, "b": other}.items():
        arrays = np.load(tmp_path / "export" / "tasks" / f"{name}.npz")
        check_results(model, run(session, images=images.numpy(), **arrays), images)


@pytest.mark.nightly
def test_half_precision(tmp_path):
    """Half the size; inputs and outputs stay float32, and classes are those of the model."""
    model = digit_adapter("group", "block_k")
    full = export_model(model, tmp_path / "full").file.stat().st_size
    result = export_model(model, tmp_path / "half", dtype="float16")
    assert result.file.stat().st_size < 0.65 * full
    assert 1e-6 < result.deviation < 5e-2
    session = session_of(result.file)
    assert {value.type for value in (*session.get_inputs(), *session.get_outputs()[:2])} == {"tensor(float)"}
    images, _ = digits()
    expected = model(images).detach()
    found = run(session, images=images.numpy())["logits"]
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    assert (found - expected).abs().median() < 2e-2 * expected.abs().max()
    assert json.loads((tmp_path / "half" / "model.json").read_text("utf-8"))["dtype"] == "float16"


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_16_bits_is_exported_with_its_rounded_weights(dtype, tmp_path):
    model = digit_adapter("shared")
    model.cast_backbone(dtype)
    fingerprint = model.fingerprint
    result = export_model(model, tmp_path / "export")
    rounded = digit_adapter("shared")
    rounded.cast_backbone(dtype)
    rounded.cast_backbone(torch.float32)
    rounded.load_adapter_state_dict(model.adapter_state_dict())
    images, _ = digits()
    check_results(rounded, run(session_of(result.file), images=images.numpy()), images)
    assert next(model.vit.parameters()).dtype == dtype
    assert json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))["fingerprint"] == fingerprint


@pytest.mark.nightly
def test_a_router_is_exported(tmp_path):
    model = digit_adapter("group")
    model.fit_router(digits("train", 120)[0], progress=False)
    model.route = "router"
    result = export_model(model, tmp_path / "export")
    images, _ = digits()
    check_results(model, run(session_of(result.file), images=images.numpy()), images)
    assert json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))["route"] == "router"


@pytest.mark.nightly
def test_large_weights_are_beside_the_file(tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program  # noqa: PLC0415 - imports onnxscript

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    model = digit_adapter("shared")
    result = export_model(model, tmp_path / "export")
    assert {path.name for path in result.file.parent.iterdir()} == {"model.onnx", "model.onnx.data", "model.json"}
    assert result.file.stat().st_size < 500_000 < (tmp_path / "export" / "model.onnx.data").stat().st_size
    (tmp_path / "export").rename(tmp_path / "moved")
    images, _ = digits()
    check_results(model, run(session_of(tmp_path / "moved" / "model.onnx"), images=images.numpy()), images)


WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys(["lpt_peft", "torch", "timm"]))  # their import fails
import numpy as np, onnxruntime
try:
    import lpt_peft
except ImportError:
    pass
else:
    raise SystemExit("lpt_peft is importable")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
inputs = {"images": np.load(sys.argv[2]), **np.load(sys.argv[3])}
logits, probabilities, groups = session.run(["logits", "probabilities", "groups"], inputs)
print(json.dumps({"logits": logits.tolist(), "groups": groups.tolist()}))
"""


def test_the_file_needs_neither_lpt_peft_nor_torch(two_tasks, tmp_path):
    models, result = two_tasks
    images, _ = digits()
    np.save(tmp_path / "images.npy", images.numpy())
    words = [result.file, tmp_path / "images.npy", result.file.parent / "tasks" / "seven.npz"]
    done = subprocess.run([sys.executable, "-I", "-c", WITHOUT, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.no_grad():
        output = models["seven"](images, return_output=True)
    np.testing.assert_allclose(found["logits"], output.logits, atol=1e-4 * float(output.logits.abs().max()))
    assert found["groups"] == output.groups.tolist()
