"""HF_HUB_OFFLINE=1, as in every ordinary test run: what is in the cache loads, the rest is said not to be there."""

from __future__ import annotations

import os

import pytest
import torch
from huggingface_hub import constants

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import encode
from lpt_peft.errors import ConfigError, HubUnavailableError
from tests.conftest import tiny_vit
from tests.hub.conftest import IMAGES, IN_OWN_PROCESS, REPO, adapter_of

pytestmark = pytest.mark.skipif(
    IN_OWN_PROCESS in os.environ or not constants.HF_HUB_OFFLINE, reason="this process has a Hub"
)
COMMIT = "0123456789" * 4


@pytest.fixture
def cache(tmp_path):
    """A cache as the client lays it out, made by hand."""
    folder = tmp_path / "models--me--places-lt"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, data in zip(("config.json", "prompts.safetensors"), encode(adapter_of()), strict=True):
        (snapshot / name).write_bytes(data)
    return tmp_path


def test_with_cache(cache):
    for revision in (None, "main", COMMIT):
        adapter = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=cache, revision=revision)
        assert torch.equal(adapter(IMAGES), adapter_of()(IMAGES))
    with pytest.raises(HubUnavailableError, match="Unset HF_HUB_OFFLINE"):
        LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=cache, force_download=True)


def test_without_cache(tmp_path):
    with pytest.raises(HubUnavailableError, match=r"Unset HF_HUB_OFFLINE\. Nor is all of it in the local cache"):
        LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=tmp_path)
    with pytest.raises(HubUnavailableError, match="Creating me/places-lt .* told to stay offline"):
        adapter_of().push_to_hub(REPO, token="hf_any")


def test_no_vit_and_none_to_build(cache):
    with pytest.raises(ConfigError, match=r"VisionTransformer.*no such architecture.*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(REPO, cache_dir=cache)
