"""lpt-peft doctor."""

from __future__ import annotations

import json

import pytest

from lpt_peft.backbones import listing
from lpt_peft.cli import main


def test_doctor_reports_attached_modules(capsys):
    assert main(["doctor", "vit_tiny_patch16_224"]) == 0
    out = capsys.readouterr().out
    assert "12 x Attention, 12 x Block" in out
    assert "shared.prompts 23,040" in out
    assert "mean [0.5, 0.5, 0.5]" in out


def test_doctor_json(capsys):
    assert main(["doctor", "vit_tiny_patch16_224", "--json", "--num-classes", "7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["supported"] is True
    assert report["trained_parameters"]["group"] == {
        "pool.prompts": 20 * 6 * 10 * 192,
        "pool.keys": 20 * 192,
        "head.weight": 7 * 192,
    }
    assert report["prompt_share"] == pytest.approx(report["prompt_parameters"] / report["frozen_parameters"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformers/dinov2", "12 x Dinov2Layer"),
        ("torchvision/vit_b_32", "12 x EncoderBlock"),
        ("open_clip/ViT-B-32", "12 x ResidualAttentionBlock"),
        ("timm/eva02_tiny_patch14_224", "12 x EvaAttention, 12 x EvaBlock"),
        ("vit_base_patch16_plus_240", "timm has no weights of this name"),
    ],
)
def test_doctor_takes_models_of_every_library(capsys, name, words):
    assert main(["doctor", name]) == 0
    assert words in capsys.readouterr().out


def test_doctor_lists_by_pattern(capsys):
    assert main(["doctor", "--list", "*beit_base_patch16_2*"]) == 0
    streams = capsys.readouterr()
    assert streams.out == "beit_base_patch16_224: yes\n"
    assert streams.err.endswith("1 of 1 take prompts.\n")
    assert main(["doctor", "--list", "swin_[st]", "--json"]) == 0
    report = {line["name"]: line["answer"] for line in json.loads(capsys.readouterr().out)}
    assert report.keys() == {"torchvision/swin_s", "torchvision/swin_t"}
    assert all("SwinTransformer cannot take prompts" in answer for answer in report.values())
    assert main(["doctor", "--list", "nope"]) == 1
    assert 'matches "nope"; try "*nope*"' in capsys.readouterr().err
    assert main(["doctor"]) == 1
    assert "needs the name of a backbone" in capsys.readouterr().err


def test_doctor_lists_families_without_a_pattern(capsys, monkeypatch):
    names = {"test_vit", "test_vit2", "resnet18", "alexnet"}
    entries = [entry for entry in listing.entries() if entry.name in names]
    monkeypatch.setattr(listing, "entries", lambda: iter(entries))
    assert main(["doctor", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "timm, vision_transformer: 2 models such as test_vit: yes"
    assert lines[1].startswith("timm, resnet: 1 models such as resnet18: timm's ResNet cannot take prompts")
    assert lines[2].startswith("torchvision, ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "ResNet cannot take prompts: it has no attention over tokens"),
        ("vit_tiny_patch16_2244", "No installed library has a model"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
    ],
)
def test_doctor_gives_the_reason_of_a_refusal(capsys, name, words):
    assert main(["doctor", name]) == 1
    streams = capsys.readouterr()
    assert words in streams.err
    assert streams.out == ""
    assert main(["doctor", name, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["supported"] is False
    assert words in report["reason"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"])
def test_doctor_takes_names_with_a_tag(name, capsys):
    assert main(["doctor", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 12
    assert main(["doctor", "vit_tiny_patch16_224.nonsense"]) == 1
    assert main(["doctor", "--list", "timm/vit_tiny_patch16_22*"]) == 0
    assert "vit_tiny_patch16_224: yes" in capsys.readouterr().out
