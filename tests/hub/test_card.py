"""The model card: facts from the file and the caller, with the shot rule, and no guesses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from lpt_peft._prompt_content import content_of
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.hub import CardOptions, model_card
from lpt_peft.metrics import ShotMetrics
from tests.checkpoint.adapters import tiny_adapter
from tests.conftest import tiny_vit

RULE = "many: n > 100, medium: 20 <= n <= 100, few: n < 20; mean over classes"
TRAINING = {
    "metrics": {"many": 0.9123, "medium": 0.8, "few": 0.7, "accuracy": 0.85, "epochs": 40, "rule": RULE, "per": [0.1]},
    "recipe": {"learning_rate": 0.1, "decay": "selected"},
}


def content_with(**options):
    return content_of(tiny_adapter(), **options)


def split(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_nothing_is_guessed():
    data, body = split(model_card(content_with(), "me/places-lt"))
    assert data == {
        "library_name": "lpt_peft",
        "pipeline_tag": "image-classification",
        "tags": ["lpt", "long-tailed-recognition", "prompt-tuning"],
    }
    for word in ("license", "dataset", "Results", "Recipe"):
        assert word not in body
    assert "7 classes" in body
    assert "group; 3 tokens in each of 2 blocks; 5 groups after block 1, 2 for an image, query final" in body
    assert "prompts and keys: 624 parameters; head: 168; 3,208 bytes" in body  # 2*3*24 + 5*1*3*24 + 5*24; 7*24


def test_facts_from_the_caller():
    options = CardOptions(license="mit", datasets=("me/places",), tags=("scenes", "lpt"), base_model="timm/vit")
    data, _ = split(model_card(content_with(), "me/places-lt", options))
    assert (data["license"], data["datasets"], data["base_model"]) == ("mit", ["me/places"], "timm/vit")
    assert data["base_model_relation"] == "adapter"
    assert data["tags"] == ["lpt", "long-tailed-recognition", "prompt-tuning", "scenes"]


def test_figures_with_their_rule():
    card = model_card(content_with(training=TRAINING), "me/places-lt")
    data, body = split(card)
    assert "model-index" not in data  # that table needs a dataset
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", body, re.MULTILINE)
    assert rows == [("many", "91.2"), ("medium", "80.0"), ("few", "70.0"), ("accuracy", "85.0")]
    assert f"Shot rule: `{RULE}`." in body
    assert "| setting | value |\n|---|---|\n| `decay` | `selected` |\n| `learning_rate` | `0.1` |\n" in body

    data, _ = split(model_card(content_with(training=TRAINING), "me/places-lt", CardOptions(datasets=("me/places",))))
    (model,) = data["model-index"]
    assert model["name"] == "places-lt"
    (result,) = model["results"]
    assert result["dataset"] == {"name": "me/places", "type": "me/places"}
    assert [metric["value"] for metric in result["metrics"]] == [0.9123, 0.8, 0.7]
    assert result["metrics"][2]["name"].startswith("few-shot accuracy (many: n > 100")
    assert ModelCard(card).data.library_name == "lpt_peft"


def test_figures_without_rule_say_so():
    training = {"metrics": {"few": 0.5}}
    card = model_card(content_with(training=training), "me/x", CardOptions(datasets=("me/places",)))
    data, body = split(card)
    assert "did not record its shot rule" in body
    assert "model-index" not in data
    for metrics in ("none", [0.5], {"few": True, "many": 3.5, "name": "x"}):
        assert "Results" not in model_card(content_with(training={"metrics": metrics}), "me/x")


def test_text_of_the_file_stays_text():
    content = content_with(
        training={"recipe": {"a`b|<script>": "x\n---\n# y"}, "metrics": {"a|b": 0.5}, "rule": "<b>\n[x](y)"}
    )
    backbone = replace(content.backbone, architecture="vit`\n\n<script>alert(1)</script>\n---")
    body = split(model_card(replace(content, backbone=backbone), "me/x"))[1]
    assert "<" not in re.sub(r"`[^`\n]*`", "", body)
    assert "\n---" not in body
    assert "](y)" not in re.sub(r"`[^`\n]*`", "", body)


def test_a_base_model_only_if_its_weights_are_the_backbones(tmp_path, monkeypatch):
    cached = tmp_path / "models--me--vit" / "snapshots" / ("0" * 40) / "model.safetensors"
    cached.parent.mkdir(parents=True)
    (tmp_path / "models--me--vit" / "refs").mkdir()
    (tmp_path / "models--me--vit" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    content = content_with()

    def base(hub_id, revision=None):
        backbone = replace(content.backbone, hub_id=hub_id, hub_revision=revision)
        return split(model_card(replace(content, backbone=backbone), "me/x"))[0].get("base_model")

    assert base("me/vit") is None  # not in the cache
    tensors = {name: tensor.contiguous() for name, tensor in tiny_vit().state_dict().items()}
    save_file(tensors, cached)
    assert base("me/vit") == "me/vit"
    for revision, found in (("0" * 40, "me/vit"), ("../refs/main", None), ("/etc/passwd", None), ("main", None)):
        assert base("me/vit", revision) == found, revision
    assert base(None) is base("me/other") is base("not a name!") is None
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, cached)
    assert base("me/vit") is None
    cached.write_bytes(b"broken")
    assert base("me/vit") is None


@pytest.mark.parametrize("subfolder", [None, "a/b"])
def test_the_snippet_runs(tmp_path, monkeypatch, subfolder):
    """The code of the card runs unchanged, with a folder of the repository's name."""
    adapter = tiny_adapter()
    folder = tmp_path / "me" / "places-lt" / (subfolder or "")
    adapter.save_pretrained(folder)
    card = model_card(read_prompt_file(folder), "me/places-lt", subfolder=subfolder)
    code, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"vit": tiny_vit()}
    exec(code, names)
    assert names["logits"].shape == (1, 7)
    assert torch.equal(names["adapter"].head.weight, adapter.head.weight)


@pytest.mark.parametrize("name", ["test", "validation"])
def test_figures_by_split_as_train_writes_them(name):
    figures = {"overall": 0.8, "many": 0.9, "medium": None, "few": 0.7}
    metrics = {"validation": dict.fromkeys(figures, 0.1), name: figures}
    card = model_card(
        content_with(training={"metrics": metrics, "rule": RULE}), "me/x", CardOptions(datasets=("me/d",))
    )
    data, body = split(card)
    assert (
        f"| accuracy on the {name} split | % |\n|---|---|\n| `many` | 90.0 |\n| `few` | 70.0 |\n| `overall` | 80.0 |"
        in body
    )
    assert f"Shot rule: `{RULE}`" in body
    [result] = data["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.9, 0.7]


def test_only_accuracies_are_called_accuracies():
    """A `ShotResult` holds other numbers from 0 to 1: an index of a class, the calibration error, counts."""
    metrics = ShotMetrics([200, 30, 2])
    metrics.update(torch.eye(3)[[0, 1, 1]] * 5, torch.tensor([0, 1, 2]))
    result = metrics.compute().to_dict()
    assert 0 <= result["expected_calibration_error"] <= 1
    _, body = split(model_card(content_with(training={"metrics": {**result, "loss": 0.3}, "rule": RULE}), "me/x"))
    table = [line.split("`")[1] for line in body.splitlines() if re.match(r"\| `\w+` \| [\d.]+ \|", line)]
    assert set(table) == {"many", "medium", "few", "overall", "accuracy", "balanced_accuracy", "worst_accuracy"} & set(
        result
    )


def test_the_snippet_names_branch_and_folder():
    card = model_card(content_with(), "me/x", subfolder='a"b', revision="v2")
    assert """from_pretrained("me/x", vit, subfolder="a\\"b", revision="v2")""" in card
    assert "revision" not in model_card(content_with(), "me/x", revision="main")
