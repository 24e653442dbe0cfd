"""The lpt-peft command and the Hub, called as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save

from lpt_peft import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.cli import main
from lpt_peft.data.transforms import transforms
from tests.checkpoint.adapters import tiny_adapter
from tests.hub.conftest import REPO


@pytest.fixture
def folder(tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "prompts", training={"metrics": {"few": 0.5}, "rule": "few: n < 20"})
    (tmp_path / "prompts" / "secret.txt").write_text("not to be sent")
    return tmp_path / "prompts"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_inspect_pull(local, folder, tmp_path, capsys):
    assert main(["push", str(folder), REPO, "--license", "mit", "--dataset", "me/places", "--message", "hello"]) == 0
    assert f"{local.endpoint}/{REPO}/commit/" in capsys.readouterr().out
    commit = local.hub.repositories[REPO].at("main")
    assert commit.message == "hello"
    assert commit.files.keys() == {"config.json", "prompts.safetensors", "README.md", ".gitattributes"}
    card = commit.files["README.md"].content.decode()
    assert "license: mit" in card
    assert "few-shot accuracy (few: n < 20)" in card

    assert main(["inspect", REPO]) == 0
    assert f"{REPO}: prompt file, format 2" in capsys.readouterr().out
    assert main(["inspect", REPO, "--json", "--revision", commit.oid]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "config.json").read_text())

    assert main(["pull", REPO, str(tmp_path / "there")]) == 0
    assert commit.oid in capsys.readouterr().out
    assert contents(tmp_path / "there") == {n: d for n, d in contents(folder).items() if n != "secret.txt"}
    local.requests.clear()
    assert main(["pull", REPO, str(tmp_path / "again"), "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == commit.oid
    assert local.requests == []


def test_a_pull_into_the_output_folder_of_a_run(local, folder, tmp_path, capsys):
    assert main(["push", str(folder), REPO]) == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    assert main(["pull", REPO, str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {"settings.json", "prompts"}
    assert (run / "prompts" / "prompts.safetensors").read_bytes() == (folder / "prompts.safetensors").read_bytes()


def test_the_output_folder_of_a_run_is_pushed(local, folder, tmp_path, capsys):
    assert main(["push", str(folder.parent), REPO]) == 0
    assert local.hub.repositories[REPO].at("main").files["prompts.safetensors"].content == (
        (folder / "prompts.safetensors").read_bytes()
    )


def test_a_copy_that_differs_on_the_hub(local, folder, capsys):
    assert main(["push", str(folder), REPO]) == 0
    local.hub.repositories[REPO].put({"config.json": b'{"model_type": "vit"}'})
    capsys.readouterr()
    assert main(["inspect", REPO]) == 0
    assert "config.json differs in backbone" in capsys.readouterr().out
    assert main(["push", str(folder), REPO]) == 1
    assert 'subfolder="prompts"' in capsys.readouterr().err


def test_a_pull_into_a_file_or_over_another_model(local, folder, tmp_path, capsys):
    assert main(["push", str(folder), REPO]) == 0
    (tmp_path / "file").write_text("text")
    assert main(["pull", REPO, str(tmp_path / "file")]) == 1
    message = capsys.readouterr().err
    assert "must be a folder, but" in message
    assert "Errno" not in message
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["pull", REPO, str(tmp_path)]) == 1
    assert "does not belong to a prompt file" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'


def test_push_json_private_and_pull_request(local, folder, capsys):
    assert main(["push", str(folder), REPO, "--json", "--private"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["commit"] == local.hub.repositories[REPO].refs["main"]
    assert local.hub.repositories[REPO].private
    assert main(["push", str(folder), REPO, "--create-pr", "--subfolder", "b"]) == 0
    assert capsys.readouterr().out.strip().endswith("/discussions/1")


def test_errors_are_one_line_and_status_1(local, folder, tmp_path, capsys):
    for arguments in (
        ["push", str(tmp_path / "nowhere"), REPO],
        ["push", str(folder), "not a name"],
        ["pull", "me/nothing", str(tmp_path / "x")],
        ["inspect", "me/nothing"],
    ):
        assert main(arguments) == 1
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("lpt-peft: ")
        assert "Traceback" not in streams.err
    assert not (tmp_path / "x").exists()
    (folder / "prompts.safetensors").write_bytes(b"broken")
    assert main(["push", str(folder), REPO]) == 1
    assert [request for request in local.requests if request.method == "POST"] == []


def test_convert_compares_with_the_pretrained_weights(local, tmp_path, capsys):
    local.hub.accounts.tokens["hf_timm"] = ("timm", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=21843)
    repository = local.hub.create("timm/vit_tiny_patch16_224.augreg_in21k", "hf_timm", private=False)
    repository.put({"model.safetensors": save(vit.state_dict())})
    vit.reset_classifier(0)
    state = {f"module.{name}": tensor for name, tensor in vit.state_dict().items()}
    state |= {
        "module.prompt_learner.Prompt_Tokens": torch.ones(12, 2, 192),
        "module.prompt_learner.Prompt_Tokens_pool": torch.ones(3, 6, 2, 192),
        "module.prompt_learner.Prompt_Keys": torch.ones(3, 192),
        "module.prompt_learner.head.weight": torch.ones(192, 4),
    }
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "same")]) == 0
    assert "is the pretrained vit_tiny_patch16_224.augreg_in21k" in capsys.readouterr().out
    adapter = LongTailPromptAdapter.from_pretrained(tmp_path / "same")
    assert {m.eps for m in adapter.vit.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert adapter.prompt_config.num_classes == 4

    state["module.norm.weight"] += 1
    torch.save({"state_dict": state}, tmp_path / "b.pth")
    assert main(["convert", str(tmp_path / "b.pth"), str(tmp_path / "other")]) == 0
    assert "is NOT the pretrained" in capsys.readouterr().out


def test_the_page_on_sharing(local, tmp_path, monkeypatch):
    """The blocks of the how-to that need a Hub (```py), after those that run everywhere (```python)."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "share-prompts.md").read_text()
    offline, online = (
        re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for kind in ("python", "py")
    )
    names = {}
    exec("\n".join(offline), names)
    adapter, images = names["adapter"], names["images"]
    monkeypatch.chdir(tmp_path)
    push, load = online
    exec(push, names)
    adapter.push_to_hub("me/places-lt", revision="v2")
    expected = adapter(images)
    vit = adapter.unwrap()
    lines = [line for line in load.splitlines() if ", vit" in line]
    assert len(lines) == 2
    LongTailPromptAdapter.from_pretrained("me/places-lt", vit, revision="v2").unwrap()
    for line in lines:
        names["vit"] = vit
        exec(line, names)
        assert torch.equal(names["adapter"](images), expected)
        names["adapter"].unwrap()


def test_predict_loads_prompts_from_the_hub(local, tmp_path, capsys):
    adapter = LongTailPromptAdapter.wrap(glyph_vit(), 3).eval()
    adapter.push_to_hub(REPO, label_names=["ant", "bee", "cat"])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert main(["predict", REPO, str(tmp_path), "--format", "jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    images = transforms(adapter.preprocess(), train=False)(Image.fromarray(pixels))[None]
    expected = adapter(images).softmax(1)[0]
    assert [entry["label"] for entry in answer["classes"]] == expected.argsort(descending=True).tolist()
    assert answer["classes"][0]["probability"] == pytest.approx(expected.max().item(), abs=1e-6)
    assert main(["predict", "me/nothing", str(tmp_path)]) == 1
    assert "me/nothing was taken for a repository" in capsys.readouterr().err
