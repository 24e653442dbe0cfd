"""A round trip through xet's chunk store, which is a folder here; LFS is tested elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from tests.checkpoint.adapters import IMAGES, tiny_adapter, tiny_encoded
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO
from tests.hub.repositories import Refused

try:
    import hf_xet
except ImportError:
    pytest.skip("hf_xet is not installed", allow_module_level=True)
if not hasattr(hf_xet, "XetSession"):
    pytest.skip("this hf_xet has no sessions, by which a folder can be a store", allow_module_level=True)


class Store:
    """A folder as xet's store; the Hub reads from it what a client put there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.url, self.hashes = folder, f"local://{folder}", {}

    def announce(self, data: bytes) -> None:
        """The xet hash of content to come, which the real Hub gets from the store."""
        path = self.folder / "announced"
        path.write_bytes(data)
        self.hashes[hashlib.sha256(data).hexdigest()] = hf_xet.hash_files([str(path)])[0].hash
        path.unlink()

    def content(self, oid: str) -> bytes:
        out = self.folder / "fetched"
        try:
            with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
                group.start_download_file(hf_xet.XetFileInfo(self.hashes[oid], None), str(out))
        except Exception as error:
            raise Refused(400, None, f"{oid} is not in the store: {error}") from error
        data = out.read_bytes()
        assert hashlib.sha256(data).hexdigest() == oid
        return data


@pytest.fixture
def store(local, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    local.xet = Store(tmp_path / "store")
    return local.xet


def test_push_and_pull(local, store):
    adapter = tiny_adapter()
    weights = tiny_encoded().weights
    store.announce(weights)
    adapter.push_to_hub(REPO)
    assert local.hub.repositories[REPO].at("main").files["prompts.safetensors"].content == weights
    assert not [request for request in local.requests if request.method == "PUT"]  # not the LFS way
    local.requests.clear()
    twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert torch.equal(twin(IMAGES), adapter(IMAGES))
    assert not [request for request in local.requests if request.host.startswith("localhost")]
    assert any("/xet-read-token/" in request.path for request in local.requests)
