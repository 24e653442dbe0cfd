"""lpt-peft with --method: train, resume after a kill, evaluate, predict, inspect, push, on the digits of the demo."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file

from lpt_peft.cli import main
from lpt_peft.cli.common.load_run import load_run
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.vit_classifier import ViTClassifier
from tests.processes import Child
from tests.test_examples import load_example

METHODS = ["linear_probe", "full"]
RATES = {"linear_probe": "2", "full": "0.1"}
WORDS = ["--backbone", "glyph_vit", "--batch-size", "16", "--shared.epochs", "2"]
WORDS += ["--flip", "0", "--crop-pct", "1", "--loss", "cross_entropy", "--sampling", "instance", "--num-workers", "0"]
WORDS += ["--optimizer", "sgd"]
FILES = {"settings.json", "checkpoints", "model", "history.json", "results.json", "predictions.safetensors"}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The image folder of the digits example, with at most 8 images of a class."""
    folder = tmp_path_factory.mktemp("digits")
    load_example("digits_folder").write(folder)
    for place in folder.glob("*/*"):
        for image in sorted(place.glob("*.png"))[8:]:
            image.unlink()
    return folder


def train(digits, output, method, *more):
    rate = ["--shared.learning-rate", RATES.get(method, "0.5")]
    rate += ["--shared.head-learning-rate", RATES.get(method, "0.5")]
    return ["train", str(digits), "--output", str(output), "--method", method, *WORDS, *rate, *more]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Finished runs by method; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        assert main(train(digits, folder / method, method)) == 0
    return folder


def model_files(run):
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


@methods
def test_train_writes_its_documented_files(runs, method):
    run = runs / method
    assert {path.name for path in run.iterdir()} == FILES
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["method"] == config["training"]["recipe"]["method"] == method
    assert config["head"]["label_names"] == [str(digit) for digit in range(10)]
    assert config["class_counts"] == [8] * 6 + [7, 4, 3, 2]
    assert json.loads((run / "settings.json").read_text())["training"]["method"] == method
    history = json.loads((run / "history.json").read_text())
    assert [(record["phase"], record["epoch"]) for record in history] == [("shared", 0), ("shared", 1)]
    assert history[1]["loss"] < history[0]["loss"]
    results = json.loads((run / "results.json").read_text())
    assert config["training"]["metrics"]["test"]["overall"] == results["test"]["overall"]
    assert results["test"]["overall"] > 0.3, "far above chance"
    assert set(results) == {"validation", "test"}


@methods
def test_evaluate_repeats_the_results_of_the_run(runs, method, capsys):
    assert main(["evaluate", str(runs / method), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((runs / method / "results.json").read_text())


@methods
def test_predict_gives_the_classes_of_the_model(runs, digits, method, capsys):
    images = [str(path) for path in sorted((digits / "test").glob("*/*.png"))[:12]]
    assert main(["predict", str(runs / method), *images, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    predicted = load_file(runs / method / "predictions.safetensors")["test.prediction"][:12].tolist()
    assert [answer["classes"][0]["label"] for answer in answers] == predicted
    assert main(["predict", str(runs / method / "model"), images[0], "--json"]) == 0  # the model file alone
    alone = json.loads(capsys.readouterr().out)[0]["classes"]
    assert [entry["class"] for entry in alone] == [entry["class"] for entry in answers[0]["classes"]]
    assert alone[0]["probability"] == pytest.approx(answers[0]["classes"][0]["probability"], rel=1e-4)


@methods
def test_inspect(runs, method, capsys):
    assert main(["inspect", str(runs / method)]) == 0
    out = capsys.readouterr().out
    assert f"model file, method {method}" in out
    assert "10 classes, logit scale 20" in out
    assert "glyph_vit" in out
    assert "All checks passed" in out
    assert main(["inspect", str(runs / method / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((runs / method / "model" / "config.json").read_text())


@methods
def test_push_refuses_and_says_what_to_do(runs, method, capsys):
    assert main(["push", str(runs / method), "me/digits"]) == 1
    err = capsys.readouterr().err
    assert "holds no prompts" in err
    assert f"hf upload me/digits {runs / method / 'model'}" in " ".join(err.split())


def test_a_prompt_run_cannot_start_from_a_model(runs, digits, tmp_path, capsys):
    words = ["train", str(digits), "--output", str(tmp_path), "--start-from", str(runs / "full"), *WORDS]
    assert main(words) == 1
    assert "was trained by --method full, which has no prompts" in " ".join(capsys.readouterr().err.split())


def killed_in(step, words):
    original = PhaseRun.training_step

    def kill(run, *args):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, *args)

    PhaseRun.training_step = kill
    return main(words)


@methods
def test_a_killed_run_resumes_with_the_same_command(runs, digits, tmp_path, method, capsys):
    words = train(digits, tmp_path / "run", method)
    with Child(killed_in, 10, words) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "training was interrupted. The same lpt-peft train command resumes it" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(words) == 0
    assert "Resuming phase shared after step 9" in " ".join(capsys.readouterr().err.split())
    assert model_files(tmp_path / "run") == model_files(runs / method)
    for name in ("results.json", "history.json", "predictions.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / method / name).read_bytes()


def test_a_model_file_whose_writing_was_interrupted_is_repaired_by_the_same_command(runs, digits, tmp_path, capsys):
    run = shutil.copytree(runs / "full", tmp_path / "run")
    expected = model_files(run)
    (run / "model" / "model.safetensors").write_bytes(b"of an earlier run")
    assert main(["evaluate", str(run)]) == 1
    assert "does not have the size and sha256" in " ".join(capsys.readouterr().err.split())
    assert main(train(digits, run, "full")) == 0
    assert model_files(run) == expected


def test_a_probe_of_another_backbone_is_refused(runs, tmp_path, capsys):
    run = shutil.copytree(runs / "linear_probe", tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    other = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32}
    (run / "settings.json").write_text(json.dumps({**settings, **other}))
    assert main(["evaluate", str(run)]) == 1
    assert "This head was trained on glyph_vit" in " ".join(capsys.readouterr().err.split())


def test_another_method_in_the_same_folder_replaces_the_result(runs, digits, tmp_path, capsys):
    """The folder then has results of both; the settings name the last."""
    run = shutil.copytree(runs / "linear_probe", tmp_path / "run")
    words = ["--no-resume", "--shared.epochs", "1", "--prompt-length", "2"]
    assert main(train(digits, run, "vpt_deep", *words)) == 0
    assert type(load_run(run).model).__name__ == "LongTailPromptAdapter"
    assert main(train(digits, run, "linear_probe", "--no-resume")) == 0
    assert isinstance(load_run(run).model, ViTClassifier)
    assert model_files(run) == model_files(runs / "linear_probe")
    assert main(["inspect", str(run)]) == 0
    assert "method linear_probe" in capsys.readouterr().out


def test_timm_and_another_run_start_from_the_tuned_vit(digits, tmp_path):
    """`--backbone-weights` takes model.safetensors of a fully tuned model of timm."""
    backbone = ["--backbone", "vit_tiny_patch16_224", "--img-size", "32"]
    first, second = tmp_path / "first", tmp_path / "second"
    words = [*backbone, "--shared.epochs", "1", "--batch-size", "64"]
    assert main(train(digits, first, "full", "--no-pretrained", *words)) == 0
    file = first / "model" / "model.safetensors"
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, checkpoint_path=str(file)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), load_run(first).model(images, return_output=True).features)
    assert main(train(digits, second, "linear_probe", "--backbone-weights", str(file), *words)) == 0
    probe = load_run(second).model
    torch.testing.assert_close(probe(images, return_output=True).features, vit(images))


REFUSED = [
    (["--method", "linear_probe", "--init-keys", "random"], "--init-keys has no effect with --method linear_probe"),
    (["--method", "full", "--prompt-length=3"], "--prompt-length has no effect with --method full"),
    (["--method=full", "--start-from", "x"], "--start-from has no effect"),
    (["--method", "vpt_deep", "--pool_size", "3"], "--pool-size has no effect with --method vpt_deep"),
    (["--method", "vpt_deep", "--init-groups", "random"], "--init-groups has no effect"),
    (["--method", "full", "--phases", "joint"], "--phases has no effect"),
    (["--method", "full", "--backbone-dtype", "bfloat16"], "--backbone-dtype"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_flags_without_effect_are_refused(digits, tmp_path, capsys, words, message):
    assert main(["train", str(digits), "--output", str(tmp_path / "run"), "--backbone", "glyph_vit", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_preset_serves_every_method_and_names_what_is_unused(digits, tmp_path, capsys):
    words = ["train", str(digits), "--output", str(tmp_path), "--preset", "paper", "--method", "linear_probe"]
    assert main([*words, "--backbone", "glyph_vit", "--shared.epochs", "1", "--crop-pct", "1"]) == 0
    assert "does not use group, phases, init_prompts, init_keys, init_groups" in " ".join(
        capsys.readouterr().err.split()
    )


def test_sizes_of_a_settings_file_that_a_method_does_not_use_are_named(digits, tmp_path, capsys):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"prompts": {"pool_size": 3, "query": "final", "prompt_length": 2}}))
    words = train(digits, tmp_path / "run", "vpt_shallow", "--config", str(config))
    assert main([*words, "--shared.epochs", "1"]) == 0
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if "no effect" in line] == [
        "lpt-peft: pool_size=3: no effect with method vpt_shallow",
        "lpt-peft: query='final': no effect with method vpt_shallow",
    ]
    assert json.loads((tmp_path / "run" / "prompts" / "config.json").read_text())["prompt"]["prompt_length"] == 2


def test_shallow_prompts_give_a_prompt_file(digits, tmp_path, capsys):
    assert main(train(digits, tmp_path, "vpt_shallow", "--prompt-length", "3")) == 0
    config = json.loads((tmp_path / "prompts" / "config.json").read_text())
    assert (config["prompt"]["placement"], config["prompt"]["phase"]) == ("shallow", "shared")
    results = json.loads((tmp_path / "results.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert main(["predict", str(tmp_path), str(next((digits / "test").glob("*/*.png")))]) == 0
