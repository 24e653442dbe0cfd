"""HF_HUB_OFFLINE=1, as in every ordinary test run: files in the cache load, others are reported as missing."""

from __future__ import annotations

import os

import pytest
import torch
from huggingface_hub import constants

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import ConfigError, HubUnavailableError
from tests.checkpoint.adapters import IMAGES, tiny_adapter, tiny_encoded
from tests.conftest import tiny_vit
from tests.hub.conftest import IN_OWN_PROCESS, REPO

pytestmark = pytest.mark.skipif(
    IN_OWN_PROCESS in os.environ or not constants.HF_HUB_OFFLINE, reason="this process has a Hub"
)
COMMIT = "0123456789" * 4


@pytest.fixture
def cache(tmp_path):
    """A cache in the layout of the client."""
    folder = tmp_path / "models--me--places-lt"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "prompts.safetensors").write_bytes(tiny_encoded().weights)
    return tmp_path


def test_with_cache(cache):
    for revision in (None, "main", COMMIT):
        adapter = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=cache, revision=revision)
        assert torch.equal(adapter(IMAGES), tiny_adapter()(IMAGES))
    with pytest.raises(HubUnavailableError, match="Unset HF_HUB_OFFLINE"):
        LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=cache, force_download=True)


def test_without_cache(tmp_path):
    with pytest.raises(HubUnavailableError, match=r"Unset HF_HUB_OFFLINE\. The local cache does not hold it either"):
        LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), cache_dir=tmp_path)
    with pytest.raises(HubUnavailableError, match="Creating me/places-lt .* in offline mode"):
        tiny_adapter().push_to_hub(REPO, token="hf_any")


def test_no_vit_and_no_backbone_to_build(cache):
    with pytest.raises(ConfigError, match=r"VisionTransformer.*no such architecture.*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(REPO, cache_dir=cache)
