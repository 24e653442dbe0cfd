"""Export to ONNX: digits through onnxruntime, with constants and with exchangeable tasks, without lpt_peft."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from lpt_peft.inference import export_model
from tests.inference.digit_models import NAMES, digit_adapter, digit_classifier, digits

onnxruntime = pytest.importorskip("onnxruntime")
CASES = {
    "shared": lambda: digit_adapter("shared"),
    "group, final": lambda: digit_adapter("group", "final"),
    "group, block_k": lambda: digit_adapter("group", "block_k"),
    "shallow": lambda: digit_adapter("shared", placement="shallow"),
    "linear_probe": lambda: digit_classifier("linear_probe"),
    "full": lambda: digit_classifier("full"),
}


def session_of(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@torch.no_grad()
def check_against(model, found, images, atol=1e-4):
    """Logits within `atol` of their size, the same groups, and probabilities of the fitted temperature."""
    output = model(images, return_output=True)
    size = output.logits.abs().max()
    assert size > 5, "the logits are those of a fitted head"
    assert (torch.from_numpy(found["logits"]) - output.logits).abs().max() < atol * size
    expected = (output.logits / model.metadata.temperature).softmax(1)
    torch.testing.assert_close(torch.from_numpy(found["probabilities"]), expected, atol=10 * atol, rtol=0)
    assert ("groups" in found) == bool(output.groups.shape[1])
    if "groups" in found:
        assert len(output.groups.unique()) > 4, "the images select different groups"
        np.testing.assert_array_equal(found["groups"], output.groups)


def run(session, **inputs):
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, inputs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_digits_get_the_logits_of_the_model(case, tmp_path):
    model = CASES[case]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = export_model(model, tmp_path / "export")
    assert result.file == tmp_path / "export" / "model.onnx"
    assert 0 <= result.deviation < 1e-4
    assert result.inputs == ("images",)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert {path.name for path in result.file.parent.iterdir()} == {"model.onnx", "model.json"}
    session = session_of(result.file)
    images, _ = digits()
    found = run(session, images=images.numpy())
    check_against(model, found, images)
    for batch in (1, 7):
        logits = run(session, images=images[:batch].numpy())["logits"]
        np.testing.assert_allclose(logits, found["logits"][:batch], atol=1e-4)
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert [output.name for output in session.get_outputs()] == list(result.outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is unchanged"


def test_metadata_names_classes_and_preprocessing(tmp_path):
    model = digit_adapter("shared")
    result = export_model(model, tmp_path / "export", preprocess={"crop_pct": 1.0, "exif": False})
    metadata = session_of(result.file).get_modelmeta().custom_metadata_map
    description = json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))
    assert description["class_names"] == json.loads(metadata["class_names"]) == list(NAMES)
    assert description["preprocess"] == json.loads(metadata["preprocess"])
    assert description["preprocess"]["mean"] == list(model.preprocess()["mean"])
    assert (description["preprocess"]["crop_pct"], description["preprocess"]["exif"]) == (1.0, False)
    assert float(metadata["temperature"]) == description["temperature"] == 0.7
    assert metadata["fingerprint"] == description["fingerprint"] == model.fingerprint
    assert (metadata["phase"], description["phase"]) == ("shared", "shared")
    content = result.file.read_bytes()
    assert b"/lpt_peft/" not in content, "the file holds no paths of this machine"


@pytest.mark.parametrize("query", ["final", "block_k"])
def test_a_session_answers_two_tasks(query, tmp_path):
    """Other classes, another number of groups, logit scale and temperature, by inputs alone."""
    first = digit_adapter("group", query)
    other = digit_adapter("group", query, seed=1, classes=7, pool_size=5, temperature=2.0)
    other.save_pretrained(tmp_path / "prompts")
    result = export_model(first, tmp_path / "export", task="ten", tasks={"seven": tmp_path / "prompts"})
    assert result.tasks == ("ten", "seven")
    assert result.deviation < 1e-4
    session = session_of(result.file)
    images, _ = digits()
    for name, model in (("ten", first), ("seven", other), ("ten", first)):
        with np.load(tmp_path / "export" / "tasks" / f"{name}.npz") as arrays:
            assert arrays.files == list(result.inputs[1:])
            found = run(session, images=images.numpy(), **arrays)
        check_against(model, found, images)
        about = json.loads((tmp_path / "export" / "tasks" / f"{name}.json").read_text("utf-8"))
        assert about["class_names"] == list(NAMES[: found["logits"].shape[1]])
        assert about["temperature"] == model.metadata.temperature
        assert about["preprocess"]["input_size"] == [3, 32, 32]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["head.weight"][0] == "classes"
    assert shapes["pool.keys"][0] == shapes["pool.prompts"][0] == "pool_size"
    assert "class_names" not in session.get_modelmeta().custom_metadata_map


def test_a_task_with_a_single_class_and_the_fewest_groups(tmp_path):
    first = digit_adapter("group")
    other = digit_adapter("group", seed=1, classes=1, pool_size=2)
    other.save_pretrained(tmp_path / "prompts")
    export_model(first, tmp_path / "export", task="a", tasks={"b": tmp_path / "prompts"})
    session = session_of(tmp_path / "export" / "model.onnx")
    images, _ = digits(count=5)
    found = run(session, images=images.numpy(), **np.load(tmp_path / "export" / "tasks" / "b.npz"))
    np.testing.assert_allclose(found["logits"], other(images).detach().numpy(), atol=2e-3)
    assert (found["probabilities"] == 1).all()


def test_linear_probes_share_a_graph(tmp_path):
    first, other = digit_classifier("linear_probe"), digit_classifier("linear_probe", classes=6, temperature=0.5)
    other.save_pretrained(tmp_path / "model")
    result = export_model(first, tmp_path / "export", task="a", tasks={"b": tmp_path / "model"})
    assert result.inputs == ("images", "head.weight", "logit_scale", "temperature")
    session = session_of(result.file)
    images, _ = digits()
    for name, model in {"a": first, "b": other}.items():
        arrays = np.load(tmp_path / "export" / "tasks" / f"{name}.npz")
        check_against(model, run(session, images=images.numpy(), **arrays), images)


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
    found = torch.from_numpy(run(session, images=images.numpy())["logits"])
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    assert (found - expected).abs().median() < 2e-2 * expected.abs().max()
    assert json.loads((tmp_path / "half" / "model.json").read_text("utf-8"))["dtype"] == "float16"


def test_a_backbone_in_bfloat16_is_exported_with_its_rounded_weights(tmp_path):
    model = digit_adapter("shared")
    model.cast_backbone(torch.bfloat16)
    fingerprint = model.fingerprint
    result = export_model(model, tmp_path / "export")
    rounded = digit_adapter("shared")
    rounded.cast_backbone(torch.bfloat16)
    rounded.cast_backbone(torch.float32)
    rounded.load_adapter_state_dict(model.adapter_state_dict())
    images, _ = digits()
    check_against(rounded, run(session_of(result.file), images=images.numpy()), images)
    assert next(model.vit.parameters()).dtype == torch.bfloat16
    assert json.loads((tmp_path / "export" / "model.json").read_text("utf-8"))["fingerprint"] == fingerprint


def test_a_router_is_exported(tmp_path):
    model = digit_adapter("group")
    model.fit_router(digits("train", 120)[0], progress=False)
    model.route = "router"
    result = export_model(model, tmp_path / "export")
    images, _ = digits()
    check_against(model, run(session_of(result.file), images=images.numpy()), images)


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


def test_the_file_needs_neither_lpt_peft_nor_torch(tmp_path):
    model = digit_adapter("group")
    result = export_model(model, tmp_path / "export", task="digits")
    images, _ = digits()
    np.save(tmp_path / "images.npy", images.numpy())
    words = [result.file, tmp_path / "images.npy", tmp_path / "export" / "tasks" / "digits.npz"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    output = model(images, return_output=True)
    np.testing.assert_allclose(found["logits"], output.logits.detach(), atol=1e-4 * float(output.logits.abs().max()))
    assert found["groups"] == output.groups.tolist()
