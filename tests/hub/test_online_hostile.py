"""Damaged and hostile repositories: each is refused by its own rule, and no other file is requested.

The forged files are those of `tests/checkpoint/test_hostile.py`; here they are downloaded.
"""

from __future__ import annotations

import pickle

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import MAX_FILE_BYTES
from lpt_peft.errors import (
    ConfigError,
    HubError,
    HubNotFoundError,
    LPTError,
    PromptFileError,
    PromptFileFormatError,
    PromptFileIntegrityError,
    PromptFileTensorError,
)
from tests.checkpoint.adapters import same_snapshot, snapshot
from tests.checkpoint.test_hostile import CASES, Forgery, config, valid
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO
from tests.hub.repositories import File

NAMES = {"prompts.safetensors"}
ran = []


class Evil:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return (ran.append, ("unpickled",))


# Files of other libraries beside or instead of a prompt file.
LURES = {
    "pytorch_model.bin": pickle.dumps(Evil()),
    "adapter_model.bin": pickle.dumps(Evil()),
    "prompts.bin": pickle.dumps(Evil()),
    "model.safetensors": b"\0" * 64,
    "adapter_config.json": b'{"auto_mapping": {"base_model_class": "os.system"}}',
    "modeling_evil.py": b"raise SystemExit",
    "__init__.py": b"raise SystemExit",
    "prompts.safetensors.index.json": b'{"weight_map": {"pool.keys": "../../etc/passwd"}}',
}


@pytest.fixture(scope="module")
def vit():
    return tiny_vit()


def refused(local, vit, error, words, **options):
    """Refused with exactly this class; the ViT is as before; only the prompt file was requested."""
    before, random = snapshot(vit), torch.get_rng_state()
    local.requests.clear()
    with pytest.raises(LPTError, match=words) as caught:
        LongTailPromptAdapter.from_pretrained(REPO, vit, **options)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 900
    assert same_snapshot(before, snapshot(vit))
    assert torch.equal(random, torch.get_rng_state())
    at_the_hub = [request for request in local.requests if not request.host.startswith("localhost")]
    assert {request.path.rpartition("/")[2] for request in at_the_hub} <= NAMES
    assert {request.method for request in local.requests} <= {"HEAD", "GET"}
    assert ran == []


def serve(local, weights, extra=LURES):
    repository = local.hub.create(REPO, "hf_write", private=False)
    repository.put({"prompts.safetensors": weights, **extra})
    return repository


def test_lures_alone_do_no_harm(local, vit):
    serve(local, valid())
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    asked = {request.path.rpartition("/")[2] for request in local.requests if not request.host.startswith("localhost")}
    assert asked == NAMES
    assert ran == []


# Half of the cases; all are tested on files.
@pytest.mark.parametrize(("forge", "error", "words"), list(CASES.values())[::2], ids=list(CASES)[::2])
def test_forged_files(local, vit, forge, error, words):
    serve(local, forge())
    refused(local, vit, error, words)


def test_a_missing_file_has_no_substitute(local, vit):
    local.hub.create(REPO, "hf_write", private=False).put({**LURES, "config.json": b"{}"})
    refused(local, vit, HubNotFoundError, "file does not exist, so there is no prompt file")


@pytest.mark.parametrize("name", ["Prompts.safetensors", "prompts.safetensors ", "./prompts.safetensors"])
def test_names_are_exact(local, vit, name):
    local.hub.create(REPO, "hf_write", private=False).put({name: valid()})
    refused(local, vit, HubNotFoundError, "file does not exist")


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 10**13])
def test_a_file_of_absurd_size_is_not_downloaded(local, vit, size):
    repository = serve(local, valid())
    files = {**repository.at("main").files, "prompts.safetensors": File(valid(), lfs=True, said=size)}
    repository.refs["main"] = repository.add(files, "large", None).oid
    refused(local, vit, PromptFileFormatError, rf"prompts\.safetensors has {size} bytes, at most {MAX_FILE_BYTES}")
    assert {request.method for request in local.requests} == {"HEAD"}


def test_a_git_lfs_pointer(local, vit):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5000\n"
    serve(local, pointer)
    refused(local, vit, PromptFileIntegrityError, "LFS pointer")


def test_a_file_outside_large_file_storage_is_a_file_like_any_other(local, vit):
    repository = serve(local, valid())
    files = {**repository.at("main").files, "prompts.safetensors": File(valid(), lfs=False)}
    repository.refs["main"] = repository.add(files, "plain", None).oid
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    files["prompts.safetensors"] = File(b"\x80\x04cos\nsystem\n.", lfs=False)
    repository.refs["main"] = repository.add(files, "pickle", None).oid
    refused(local, vit, PromptFileFormatError, "declares a header")


BACKBONES = {
    "an address": {"architecture": "hf_hub:evil/model", "pretrained_tag": "x"},
    "a folder": {"architecture": "local-dir:/tmp", "pretrained_tag": "x"},
    "a class": {"architecture": "os.system", "pretrained_tag": "x"},
    "another library": {"library": "subprocess"},
    "a million blocks": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"depth": 10**6}},
    "a huge image": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"img_size": 10**6}},
    "a file": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"checkpoint_path": "/x"}},
    "a callable": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"norm_layer": "eval"}},
    "another hub id": {"hub_id": "evil/model", "architecture": "x", "pretrained_tag": "x"},
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_no_backbone_of_the_files_choice_is_built(local, backbone):
    forgery = Forgery.start()
    forgery.config["backbone"].update(backbone)
    serve(local, forgery.bytes())
    local.requests.clear()
    with pytest.raises(ConfigError, match=r"not built here.*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(REPO)
    assert all(REPO in request.path or request.host.startswith("localhost") for request in local.requests)


def test_another_backbones_fingerprint(local, vit):
    serve(local, config("backbone/fingerprint", "0" * 64)())
    with pytest.raises(PromptFileError, match="other weights"):
        LongTailPromptAdapter.from_pretrained(REPO, vit)


def test_a_card_that_lies_is_not_read(local, vit):
    card = b"---\nlibrary_name: transformers\nauto_map: {AutoModel: evil.Evil}\nbase_model: evil/model\n---\n"
    serve(local, valid(), {**LURES, "README.md": card})
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    assert not any("README" in request.path for request in local.requests)


def test_redirects_to_other_places_stay_without_a_token(local, vit):
    """The server chooses the Location of large files; the token is not sent there."""
    serve(local, valid())
    LongTailPromptAdapter.from_pretrained(REPO, vit, token="hf_write").unwrap()
    assert all(request.token is None for request in local.requests if request.host.startswith("localhost"))


def test_refused_files_are_refused_from_the_cache_too(local, vit):
    serve(local, CASES["NaN"][0]())
    for options in ({}, {}, {"local_files_only": True}):
        with pytest.raises(PromptFileTensorError, match="NaN or infinity"):
            LongTailPromptAdapter.from_pretrained(REPO, vit, **options)
    with pytest.raises(HubError, match="revision does not exist"):
        LongTailPromptAdapter.from_pretrained(REPO, vit, revision="../../etc")
