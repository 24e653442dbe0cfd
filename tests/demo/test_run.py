"""The digits run with few epochs: its output, its interruption and its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from lpt_peft import LongTailPromptAdapter
from lpt_peft.cli import main
from lpt_peft.data.digits import DigitsLT, digits_counts
from lpt_peft.demo import glyph_vit
from lpt_peft.demo.rows import rows
from lpt_peft.demo.run import DemoError, run_demo
from lpt_peft.errors import ConfigError
from lpt_peft.recipe import predict
from lpt_peft.recipe.training.phase import PhaseRun

NAMES = ["linear probe, cross-entropy", "linear probe, A-GCL", "VPT-Deep, cross-entropy", "LPT, phase 1", "LPT"]


def test_the_backbone_is_small_and_its_features_separate_digits():
    """Nearest class mean on frozen features, without training."""
    vit = glyph_vit()
    assert sum(t.numel() * t.element_size() for t in vit.state_dict().values()) <= 6 * 2**20
    dataset = DigitsLT("test")
    with torch.no_grad():
        features = vit.forward_head(vit.forward_features(torch.stack([image for image, _ in dataset])), pre_logits=True)
    features = torch.nn.functional.normalize(features, dim=1)
    labels = torch.tensor(dataset.labels)
    means = torch.stack([features[labels == digit][:25].mean(0) for digit in range(10)])
    held_out = torch.cat([(labels == digit).nonzero()[25:, 0] for digit in range(10)])
    accuracy = ((features[held_out] @ means.T).argmax(1) == labels[held_out]).float().mean()
    assert accuracy > 0.6


def test_rows_train_on_the_same_number_of_images_with_the_same_head():
    table = rows(20)
    assert [row.name for row in table] == NAMES
    assert {sum(phase.epochs for phase in row.settings.plan.values()) for row in table} == {20}
    assert len({row.settings.batch_size for row in table}) == 1
    heads = {
        (*model.head.weight.shape, model.head.scale, model.head_drop.p) for model in (row.build() for row in table)
    }
    assert len(heads) == 1


def test_the_probe_is_the_backbone_with_a_head():
    probe, vit = rows()[0].build().eval(), glyph_vit()
    images = torch.randn(2, 3, 32, 32)
    out = probe(images, return_output=True)
    torch.testing.assert_close(out.features, vit.forward_head(vit.forward_features(images), pre_logits=True))
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight"]


@pytest.mark.slow
def test_the_command_resumes_and_writes_its_documented_files(tmp_path, capsys, monkeypatch):
    original, steps, at = PhaseRun.training_step, [], 3 * 2 * 41 + 5  # in the fourth row

    def interrupt(run, *args):
        steps.append((run.name, run.step))
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        original(run, *args)

    monkeypatch.setattr(PhaseRun, "training_step", interrupt)
    words = ["demo", "--output", str(tmp_path), "--epochs", "2"]
    assert main(words) == 130
    err = capsys.readouterr().err
    assert "stopped after step 5 of phase shared" in err
    assert "The same command resumes" in err
    assert not (tmp_path / "results.json").exists()
    other = tmp_path / "runs" / "other"
    other.mkdir()
    assert main([*words, "--epochs", "3"]) == 1
    assert "settings.shared.epochs is 3 now and was 2" in capsys.readouterr().err
    steps.clear()
    at = None
    assert main(words) == 0
    assert len(steps) == 2 * 41 - 5 + 2 * 41, "the first three rows are not trained again"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "digits.png", "prompts", "test", "runs"}
    assert list((tmp_path / "runs").iterdir()) == [other]
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)
    assert "all predictions are identical" in out
    assert "many: n > 100, medium: 20 < n <= 100, few: n <= 20" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == NAMES
    assert all(len(row["results"]) == 1 for row in results["rows"])
    assert all(0 <= row["overall"]["mean"] <= 1 and row["overall"]["spread"] is None for row in results["rows"])
    assert results["class_counts"] == digits_counts()
    head, prompts = 10 * 128, 6 * 8 * 128
    group = 10 * 3 * 8 * 128 + 10 * 128
    assert [row["trained_parameters"] for row in results["rows"]] == [
        head,
        head,
        head + prompts,
        head + prompts,
        head + prompts + group,
    ]
    assert Image.open(tmp_path / "digits.png").size[0] > 1000
    adapter = LongTailPromptAdapter.from_pretrained(tmp_path / "prompts", glyph_vit())
    assert adapter.phase == "group"
    assert adapter.metadata.class_counts == tuple(digits_counts())
    output, labels = predict(adapter, DigitsLT("test"))
    right = (output.logits.argmax(1) == labels).float()
    per_class = [float(right[labels == digit].mean()) for digit in range(10)]
    assert per_class == pytest.approx(results["rows"][-1]["results"][0]["per_class"])
    assert adapter.metadata.training["metrics"]["test"]["overall"] == pytest.approx(sum(per_class) / 10)
    chosen = torch.tensor(results["groups_per_class"])
    torch.testing.assert_close(chosen.sum(1), torch.full((10,), 2.0))


@pytest.mark.slow
def test_the_printed_commands_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lpt_peft.demo.run.rows", lambda epochs: rows(epochs)[3:])
    monkeypatch.setattr("lpt_peft.demo.run.draw", lambda *_: None)  # the figure needs all rows
    output = tmp_path / "un résumé"
    assert main(["demo", "--output", str(output), "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    commands = printed.partition("Try next:\n")[2].splitlines()
    assert [line.split()[1] for line in commands] == ["predict", "evaluate", "inspect", "doctor"]
    answers = {}
    for line in commands:
        program = f'lpt-peft() {{ {sys.executable} -m lpt_peft "$@"; }}\n{line} --json'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers[line.split()[1]] = json.loads(done.stdout)
    result = json.loads((output / "results.json").read_text())["rows"][-1]["results"][0]
    assert len(answers["predict"]) == 3
    assert answers["evaluate"]["test"]["num_images"] == 500
    assert answers["evaluate"]["test"]["overall"] == pytest.approx(result["overall"], abs=0.005), "PNG has 8 bits"
    assert answers["evaluate"]["test"]["rule"] == result["rule"]
    assert answers["doctor"]["supported"] is True


def test_a_prompt_file_with_other_predictions_is_an_error(tmp_path, monkeypatch):
    original = LongTailPromptAdapter.from_pretrained.__func__

    def tampered(cls, *args, **kwargs):
        adapter = original(cls, *args, **kwargs)
        with torch.no_grad():
            adapter.head.weight[0, 0] += 1e-3
        return adapter

    monkeypatch.setattr(LongTailPromptAdapter, "from_pretrained", classmethod(tampered))
    monkeypatch.setattr("lpt_peft.demo.run.rows", lambda epochs: rows(epochs)[3:4])
    with pytest.raises(DemoError, match="other predictions"):
        run_demo(tmp_path, epochs=2, progress=False)


def test_invalid_numbers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="seeds"):
        run_demo(tmp_path / "new", seeds=0)
    assert not (tmp_path / "new").exists()
