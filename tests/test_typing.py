"""Types of the public API in a user's type checker: every name, and no `Any` from a call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lpt_peft

ROOT = Path(__file__).parents[1]

# Stand-ins for transformers, which takes minutes to check; the adapter names two of its classes.
STUBS = {
    "transformers/__init__.pyi": "class PreTrainedConfig:\n    id2label: dict[int, str]\n",
    "transformers/modeling_outputs.pyi": (
        "from torch import Tensor\nclass ImageClassifierOutput:\n    loss: Tensor | None\n    logits: Tensor | None\n"
    ),
}

ADAPTER = """
import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput
from typing_extensions import assert_type
from collections.abc import Mapping
from typing import Literal

from lpt_peft import Classifier
from lpt_peft.inference import Prediction
from lpt_peft import (
    SHOT_RULES, AdapterOutput, CosineClassifier, LongTailPromptAdapter, LPTError, PoolMatch, PromptBank, PromptConfig,
    PromptPool, SharedPrompt, ShotMetrics, ShotResult, ShotRule, ViTClassifier, __version__, cosine_logits,
    decay_selected, shot_metrics,
)
from lpt_peft.bank import BankOutput, TaskPrediction


class OwnAdapter(LongTailPromptAdapter):
    pass


def adapter_calls(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    adapter = LongTailPromptAdapter.wrap(vit, 5, prompt_length=3)
    assert_type(adapter, LongTailPromptAdapter)
    assert_type(adapter(images), Tensor)
    assert_type(adapter(images, return_output=False), Tensor)
    output = adapter(images, return_output=True)
    assert_type(output, AdapterOutput)
    assert_type(output.groups, Tensor)
    assert_type(adapter(pixel_values=images), ImageClassifierOutput)
    assert_type(adapter(pixel_values=images, labels=labels), ImageClassifierOutput)
    assert_type(adapter(images, labels=labels), ImageClassifierOutput)
    assert_type(adapter(pixel_values=images, return_output=True), AdapterOutput)
    assert_type(adapter.features(images), Tensor)
    assert_type(adapter.phase, Literal["shared", "group"])
    adapter.phase = "group"
    adapter.phase = "both"  # error
    assert_type([p for p in adapter.trainable_parameters()], list[nn.Parameter])
    assert_type(adapter.adapter_state_dict(), dict[str, Tensor])
    adapter.load_adapter_state_dict(adapter.adapter_state_dict())
    assert_type(adapter.unwrap(), nn.Module)
    assert_type(adapter.fingerprint, str)
    with adapter.disable_adapter() as nothing:
        assert_type(nothing, None)
    assert_type(adapter.get_nb_trainable_parameters(), tuple[int, int])
    assert_type(adapter.no_weight_decay(), set[str])
    assert_type(adapter.num_classes, int)
    assert_type(adapter.num_features, int)
    assert_type(adapter.get_classifier(), CosineClassifier)
    assert_type(adapter.pretrained_cfg, dict[str, object])
    assert_type(adapter.default_cfg, dict[str, object])
    assert_type(adapter.config, PreTrainedConfig)
    assert_type(adapter.prompt_config, PromptConfig)
    assert_type(adapter.device, torch.device)
    assert_type(adapter.dtype, torch.dtype)
    assert_type(adapter.set_grad_checkpointing(True), None)
    assert_type(adapter.gradient_checkpointing_enable(), None)
    assert_type(adapter.backbone_in_state_dict, bool)
    assert_type(adapter.criterion(output, labels), Tensor)
    assert_type(adapter.shared(), Tensor)
    assert_type(adapter.pool(images).prompts, Tensor)
    assert_type(adapter.head(images), Tensor)
    assert_type(adapter.train(), LongTailPromptAdapter)


def files(vit: nn.Module) -> None:
    adapter = OwnAdapter.from_pretrained("folder", vit, check_backbone="warn")
    assert_type(adapter, OwnAdapter)
    adapter.save_pretrained("folder", is_main_process=False, save_function=torch.save, label_names=["a"])
    adapter.save_pretrained("folder", label_nmaes=["a"])  # error
    adapter.load_prompts("folder", part="shared")
    adapter.load_prompts("folder", part="some")  # error
    OwnAdapter.from_pretrained("folder", vit, check_backbone="maybe")  # error
    assert_type(adapter.push_to_hub("me/prompts", private=True), CommitInfo)


def without_prompts(vit: nn.Module, images: Tensor) -> None:
    model = ViTClassifier.wrap(vit, 5, method="full")
    assert_type(model, ViTClassifier)
    assert_type(model(images), Tensor)
    assert_type(model(images, return_output=True), AdapterOutput)
    assert_type(model.features(images), Tensor)
    assert_type(model.train(), ViTClassifier)
    assert_type(model.unwrap(), nn.Module)
    ViTClassifier.wrap(vit, 5, method="lpt")  # error
    ViTClassifier.wrap(vit, 5)  # error
    model.save_pretrained("folder", label_names=["a"])
    assert_type(ViTClassifier.from_pretrained("folder", vit), ViTClassifier)


def predictions(vit: nn.Module, images: Tensor) -> None:
    classifier = Classifier.from_pretrained("folder", vit, batch_size=8, num_workers=None, dtype=torch.bfloat16)
    assert_type(classifier, Classifier)
    assert_type(classifier(images), list[Prediction])
    assert_type(next(classifier.stream(["a.png"], show=2)).label_name, str)
    assert_type(classifier.label_names, tuple[str, ...])
    Classifier.from_pretrained("folder", check_backbone="maybe")  # error


def parts(features: Tensor, keys: nn.Parameter) -> None:
    shared, pool, head = SharedPrompt(4, 2, 8), PromptPool(5, 2, 2, 8), CosineClassifier(8, 3)
    assert_type(shared(), Tensor)
    match = pool(features)
    assert_type(match, PoolMatch)
    assert_type(match.similarity, Tensor)
    assert_type(pool.dead_groups(), list[int])
    assert_type(head(features), Tensor)
    assert_type(cosine_logits(features, head.weight), Tensor)
    assert_type(decay_selected(keys, 0.1), None)
    config = PromptConfig(dim=8, depth=4, num_classes=3)
    assert_type(config.num_prompt_parameters, int)
    assert_type(config.tensor_shapes, dict[str, tuple[int, ...]])


def figures(logits: Tensor, labels: Tensor) -> None:
    metrics = ShotMetrics([5, 2, 1])
    metrics.update(logits, labels)
    assert_type(metrics.compute(), ShotResult)
    assert_type(shot_metrics([1], [1], [1]), ShotResult)
    assert_type(SHOT_RULES["lift"], ShotRule)
    assert_type(SHOT_RULES, Mapping[str, ShotRule])
    assert_type(__version__, str)
    error: ValueError | Exception = LPTError("x")
    print(error)


def bank_calls(vit: nn.Module, images: Tensor) -> None:
    bank = PromptBank(vit, capacity=8)
    assert_type(bank.add("cars", "folder", pinned=True), None)
    assert_type(bank.tasks, tuple[str, ...])
    output = bank(images, tasks=["cars", None])
    assert_type(output, BankOutput)
    assert_type(output[0], TaskPrediction)
    assert_type(output[0].probabilities, Tensor)
    assert_type(output[:2], list[TaskPrediction])
    assert_type(bank.export_module(["cars"])(images, images), tuple[Tensor, Tensor, Tensor])
    assert_type(bank.memory(), dict[str, int])
"""

LOSSES = """
from torch import Tensor
from typing_extensions import assert_type

from lpt_peft import AdapterOutput, AGCLLoss, ClassBalancedSampler, DualSampler, LogitAdjustedLoss, LPTLoss, agcl_loss
from lpt_peft import logit_adjusted_loss


def objective(output: AdapterOutput, target: Tensor) -> None:
    criterion = LPTLoss([5, 2, 1], epochs=3)
    assert_type(criterion(output, target), Tensor)
    assert_type(criterion(output, target, 1), Tensor)
    assert_type(AGCLLoss([5, 2, 1])(output.logits, target), Tensor)
    assert_type(agcl_loss(output.logits, target, [5, 2, 1]), Tensor)
    assert_type(LogitAdjustedLoss({0: 5, 1: 2, 2: 1})(output.logits, target), Tensor)
    assert_type(logit_adjusted_loss(output.logits, target, [5, 2, 1]), Tensor)


def draws(labels: list[int]) -> None:
    assert_type(list(DualSampler(labels, 4)), list[list[int]])
    assert_type(list(ClassBalancedSampler(labels)), list[int])
"""


def check(script: str, folder: Path) -> str:
    """Run mypy --strict on a user's script."""
    for name, text in {**STUBS, "user.py": script, "mypy.ini": CONFIG}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    environment = {**os.environ, "MYPYPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


CONFIG = """[mypy]
strict = True
[mypy-lpt_peft.*]
follow_imports = silent
[mypy-timm.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.slow
def test_a_users_script_sees_no_any(tmp_path):
    pytest.importorskip("mypy")
    lines = ADAPTER.splitlines()
    wrong = {str(number) for number, line in enumerate(lines, 1) if line.endswith("# error")}
    found = check(ADAPTER, tmp_path)
    assert set(re.findall(r"user\.py:(\d+): error", found)) == wrong, found


@pytest.mark.slow
def test_a_users_script_sees_no_any_in_losses_and_samplers(tmp_path):
    pytest.importorskip("mypy")
    assert "error" not in check(LOSSES, tmp_path)


def test_the_scripts_use_every_public_name():
    words = set(re.findall(r"\w+", ADAPTER + LOSSES))
    assert set(lpt_peft.__all__) <= words
