"""Tasks of a bank from the Hub: names, revisions, and repositories that are missing, hostile or out of reach."""

from __future__ import annotations

import pytest
import torch

from lpt_peft import PromptBank
from lpt_peft.errors import HubError, HubNotFoundError, PromptFileError
from tests.bank.tasks import free_slots, slots_of
from tests.checkpoint.adapters import IMAGES, tiny_adapter
from tests.checkpoint.test_hostile import values
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO


def test_tasks_from_the_hub(local):
    adapter = tiny_adapter()
    first = adapter.push_to_hub(REPO, label_names=list("abcdefg")[: adapter.prompt_config.num_classes]).oid
    expected = {first: adapter.eval()(IMAGES).detach()}
    with torch.no_grad():
        adapter.head.weight.neg_()
    second = adapter.push_to_hub(REPO).oid
    expected[second] = adapter(IMAGES).detach()
    bank = PromptBank(tiny_vit(), capacity=2)
    bank.add("old", REPO, revision=first)
    bank.add("new", REPO)
    for name, revision in {"old": first, "new": second}.items():
        assert torch.allclose(bank(IMAGES, name).logits, expected[revision], atol=1e-5)
    assert bank(IMAGES, "old")[0].label_names[0] == "a"
    bank.replace("new", REPO, revision=first, local_files_only=True)
    assert torch.allclose(bank(IMAGES, "new").logits, expected[first], atol=1e-5)
    assert free_slots(bank) == 1  # the same file: a slot for both names


def test_failed_downloads_change_nothing(local):
    tiny_adapter().push_to_hub(REPO)
    bank = PromptBank(tiny_vit(), capacity=2)
    bank.add("a", REPO)
    before = bank.tasks, slots_of(bank), bank.memory()
    local.hub.create("me/hostile", "hf_write", private=False).put({"prompts.safetensors": values(float("nan"))()})
    refused = {"me/missing": HubNotFoundError, "me/hostile": PromptFileError}
    for source, error in refused.items():
        for change in (bank.add, bank.replace):
            with pytest.raises(error):
                change("b" if change == bank.add else "a", source)
            assert (bank.tasks, slots_of(bank), bank.memory()) == before
    with local.fault("HEAD", ".*", 503), pytest.raises(HubError):
        bank.replace("a", REPO, revision="v2")
    with pytest.raises(HubError, match="cache"):
        bank.add("b", "me/never", local_files_only=True)
    assert (bank.tasks, slots_of(bank), bank.memory()) == before
