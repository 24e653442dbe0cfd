"""What a bank says about its tasks, and which version answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lpt_peft import PromptBank
from lpt_peft.bank.reader import digest_of
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.errors import InputError
from tests.bank.tasks import make_adapter, save
from tests.conftest import tiny_vit


def test_a_description_is_that_of_the_current_version(tmp_path: Path) -> None:
    vit = tiny_vit(depth=4)
    first, second = make_adapter(vit, 0, num_classes=2), make_adapter(vit, 1, phase="shared", num_classes=3)
    changed = {**first.preprocess(), "mean": [0.1, 0.2, 0.3]}
    save(first, tmp_path / "first", label_names=["a", "b"], preprocess=changed)
    save(second, tmp_path / "second")
    bank = PromptBank(vit, capacity=1)
    bank.add("task", tmp_path / "first", pinned=True)
    found = bank.describe("task")
    assert found.digest == digest_of(read_prompt_file(tmp_path / "first"))
    expected = {"name": "task", "digest": found.digest, "num_classes": 2, "label_names": ["a", "b"]}
    expected |= {"temperature": None, "preprocess": changed, "phase": "group", "pinned": True, "in_slot": True}
    assert json.loads(json.dumps(found._asdict())) == json.loads(json.dumps(expected))
    bank.replace("task", tmp_path / "second")
    replaced = bank.describe("task")
    assert (replaced.num_classes, replaced.label_names, replaced.phase) == (3, None, "shared")
    assert (replaced.pinned, replaced.preprocess) == (True, first.preprocess())
    assert replaced.digest != found.digest
    bank.remove("task")
    with pytest.raises(InputError, match="no task 'task'"):
        bank.describe("task")


def test_results_name_the_version_that_answered(tmp_path: Path) -> None:
    vit = tiny_vit(depth=4)
    for seed in range(3):
        save(make_adapter(vit, seed), tmp_path / str(seed))
    bank = PromptBank(vit, capacity=2)
    for seed in range(2):
        bank.add(str(seed), tmp_path / str(seed))
    output = bank(torch.randn(3, 3, 32, 32), ["0", "1", "0"])
    assert [result.digest for result in output] == [bank.describe(name).digest for name in "010"]
    bank.replace("0", tmp_path / "2")
    assert output[0].digest != bank.describe("0").digest, "a result is that of its batch"
    [plain] = bank(torch.randn(1, 3, 32, 32), [None])
    assert plain.digest == ""
    assert bank(torch.randn(1, 3, 32, 32), "0")[0].digest == bank.describe("0").digest
