"""Model files: hostile and damaged files are refused by name, and no value is lost."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lpt_peft.checkpoint.model_file import MODEL_METHODS, read_model_file, write_model_file
from lpt_peft.errors import (
    ConfigError,
    InputError,
    ModelFileError,
    ModelFileNotFoundError,
    PromptFileExistsError,
)
from lpt_peft.recipe import method_settings
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for method in MODEL_METHODS:
        model = ViTClassifier.wrap(tiny_vit(), 3, method=method)
        model.save_pretrained(folder / method, label_names=["a", "b", "c"], class_counts=[3, 2, 1])
    return folder


@pytest.fixture(params=MODEL_METHODS)
def folder(request, written, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(written / request.param, tmp_path / "copy")


def change(folder, edit):
    """Edit the parsed config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def replace_weights(folder, data, name="model.safetensors"):
    """Other bytes, with a configuration that states their size and hash: what an attacker would write."""
    (folder / name).write_bytes(data)
    stated = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(folder, lambda config: config["weights"].update({name: stated}))


def head_file(folder):
    return "head.safetensors" if (folder / "head.safetensors").exists() else "model.safetensors"


def test_the_names_of_the_methods_agree():
    assert set(MODEL_METHODS) < set(method_settings.METHODS)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelFileNotFoundError, match=f"{name} does not exist. A model file is a folder with"):
        read_model_file(folder)


def test_a_folder_in_place_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelFileError, match="is not a regular file"):
        read_model_file(folder)


@given(st.data())
def test_truncated_or_changed_weights(written, tmp_path_factory, data):
    folder = shutil.copytree(written / data.draw(st.sampled_from(MODEL_METHODS)), tmp_path_factory.mktemp("x") / "copy")
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="does not have the size and sha256"):
        read_model_file(folder)


def test_appended_bytes(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ModelFileError, match="does not have the size and sha256"):
        read_model_file(folder)


def head(*shape, dtype=torch.float32, value=1.0):
    return torch.full(shape, value, dtype=dtype)


WEIGHTS = [
    (b"", "safetensors refuses"),
    (struct.pack("<Q", 2**60) + b"{}", "safetensors refuses"),
    (b"not safetensors at all", "safetensors refuses"),
    (save({"other": head(3, 24)}), "head.weight in .* is missing"),
    (save({"head.weight": head(4, 24)}), r"\(4, 24\), and must be \(3, d\)"),
    (save({"head.weight": head(3)}), r"\(3,\), and must be"),
    (save({"head.weight": head(3, 24, dtype=torch.int32)}), "torch.int32"),
    (save({"head.weight": head(3, 24, value=math.nan)}), "holds NaN or infinity"),
]


@pytest.mark.parametrize(("data", "words"), WEIGHTS)
def test_hostile_weights_with_a_matching_hash(folder, data, words):
    replace_weights(folder, data, head_file(folder))
    with pytest.raises(ModelFileError, match=words):
        read_model_file(folder)


def test_a_head_of_another_width_and_weights_of_another_vit(folder):
    replace_weights(folder, save({"head.weight": head(3, 25)}), head_file(folder))
    with pytest.raises(ModelFileError, match="features of width 25"):
        ViTClassifier.from_pretrained(folder, tiny_vit())


def test_tensors_that_the_method_does_not_have(written, tmp_path):
    probe = shutil.copytree(written / "linear_probe", tmp_path / "probe")
    replace_weights(probe, save({"head.weight": head(3, 24), "norm.weight": head(24)}))
    with pytest.raises(ModelFileError, match="holds 2 tensors, and must hold the head alone"):
        read_model_file(probe)
    full = shutil.copytree(written / "full", tmp_path / "full")
    replace_weights(full, save({"norm.weight": head(24)}))
    with pytest.raises(ModelFileError, match="are not those of this VisionTransformer: missing"):
        ViTClassifier.from_pretrained(full, tiny_vit())
    replace_weights(full, (written / "full" / "model.safetensors").read_bytes())
    change(full, lambda config: config["backbone"].update(fingerprint="0" * 64))
    with pytest.raises(ModelFileError, match="fingerprint that config.json states"):
        ViTClassifier.from_pretrained(full, tiny_vit())


CONFIGS = [
    (lambda c: c.update(format="other"), 'has no "format": "lpt_peft-model"'),
    (lambda c: c.update(format_version=2), "format version 2; .* Upgrade"),
    (lambda c: c.update(format_version=0), "format_version=0 must be"),
    (lambda c: c.update(method="lpt"), 'method=.* must be "linear_probe" or "full"'),
    (lambda c: c.update(more=1), r"unknown key\(s\) \['more'\]"),
    (lambda c: c.pop("head"), r"lacks \['head'\]"),
    (lambda c: c["head"].update(num_classes=0), "head.num_classes=0"),
    (lambda c: c["head"].update(label_names=["a"]), "head.label_names has 1 entries"),
    (lambda c: c.update(class_counts=[1, 2]), "class_counts has 2 entries"),
    (lambda c: c["head"].update(logit_scale=-1), "head.logit_scale=-1 must be greater than 0"),
    (lambda c: c["weights"].update({"../x": {}}), r"weights has unknown key\(s\) \['../x'\]"),
    (lambda c: c["weights"]["model.safetensors"].update(bytes=2**40), "bytes=.* at most"),
    (lambda c: c["weights"]["model.safetensors"].update(sha256="x"), "sha256='x' must be 64"),
    (lambda c: c.update(method={"full": "linear_probe", "linear_probe": "full"}[c["method"]]), "weights=.* must be of"),
    (lambda c: c["backbone"].update(fingerprint="x"), "backbone.fingerprint='x' must be 64"),
    (lambda c: c["preprocess"].update(std=[1.0]), "preprocess.std=.* of the length"),
    (lambda c: c.update(training={"x": "y" * 2**16}), "training has .* bytes"),
]


@pytest.mark.parametrize(("edit", "words"), CONFIGS)
def test_configurations_that_break_the_format(folder, edit, words):
    change(folder, edit)
    with pytest.raises(ModelFileError, match=words):
        read_model_file(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\ufeff{}", '{"a":' * 100])
def test_configurations_that_are_not_strict_json(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match="JSON"):
        read_model_file(folder)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4), st.data())
def test_any_value_in_any_place_is_accepted_or_refused_by_name(written, tmp_path_factory, value, data):
    folder = shutil.copytree(written / "linear_probe", tmp_path_factory.mktemp("x") / "copy")
    config = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    inner = config[key] if isinstance(config[key], dict) and data.draw(st.booleans()) and config[key] else config
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        content = read_model_file(folder)
    except ModelFileError:
        return
    assert content.head.shape == (3, 24)


def test_content_survives_and_equal_content_gives_equal_bytes(folder, tmp_path):
    content = read_model_file(folder)
    write_model_file(tmp_path / "again", content)
    for name in {path.name for path in folder.iterdir()}:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert content.metadata.label_names == ("a", "b", "c")


def test_another_librarys_folder_is_not_overwritten(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(PromptFileExistsError, match="does not belong to a model file of lpt_peft"):
        write_model_file(other, read_model_file(folder))
    assert [path.name for path in other.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder"):
        write_model_file(tmp_path / "file", read_model_file(folder))


def test_what_cannot_be_written_is_found_before_training():
    model = ViTClassifier.wrap(tiny_vit(), 3, method="full")
    for options, words in [
        ({"label_names": ["a", "b", "c\n"]}, "control characters"),
        ({"label_names": ["a", "b"]}, "has 2 entries"),
        ({"training": {"x": float("nan")}}, "finite numbers"),
        ({"training": {"x": "y" * 2**16}}, "training has"),
    ]:
        with pytest.raises(InputError, match=words):
            model.save_pretrained("not written", is_main_process=False, **options)
