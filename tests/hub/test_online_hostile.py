"""Repositories that are broken or made to do harm: each refused by its own rule, and no other file is asked for.

The forged files are those of `tests/checkpoint/test_hostile.py`; here they come over the wire.
"""

from __future__ import annotations

import pickle

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
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
from tests.checkpoint.test_hostile import CASES, Forgery, config, good, snapshot
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO
from tests.hub.repositories import File

NAMES = {"config.json", "prompts.safetensors"}
ran = []


class Evil:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return (ran.append, ("unpickled",))


# What people, or other libraries, put beside or instead of a prompt file.
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
    """Refused with exactly this class; the ViT is as before; only the two names were asked for."""
    before, random = snapshot(vit), torch.get_rng_state()
    local.requests.clear()
    with pytest.raises(LPTError, match=words) as caught:
        LongTailPromptAdapter.from_pretrained(REPO, vit, **options)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 900
    after = snapshot(vit)
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert torch.equal(random, torch.get_rng_state())
    at_the_hub = [request for request in local.requests if not request.host.startswith("localhost")]
    assert {request.path.rpartition("/")[2] for request in at_the_hub} <= NAMES
    assert {request.method for request in local.requests} <= {"HEAD", "GET"}
    assert ran == []


def serve(local, pair, extra=LURES):
    repository = local.hub.create(REPO, "hf_write", private=False)
    repository.put({**dict(zip(("config.json", "prompts.safetensors"), pair, strict=True)), **extra})
    return repository


def test_lures_alone_do_no_harm(local, vit):
    serve(local, good())
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    asked = {request.path.rpartition("/")[2] for request in local.requests if not request.host.startswith("localhost")}
    assert asked == NAMES
    assert ran == []


# Half of the cases: that the others are refused, too, is shown on files.
@pytest.mark.parametrize(("forge", "error", "words"), list(CASES.values())[::2], ids=list(CASES)[::2])
def test_forged_files(local, vit, forge, error, words):
    serve(local, forge())
    refused(local, vit, error, words)


@pytest.mark.parametrize("missing", ["config.json", "prompts.safetensors", "both"])
def test_a_missing_file_has_no_stand_in(local, vit, missing):
    repository = local.hub.create(REPO, "hf_write", private=False)
    pair = dict(zip(("config.json", "prompts.safetensors"), good(), strict=True))
    repository.put({**LURES, **{name: data for name, data in pair.items() if missing not in (name, "both")}})
    refused(local, vit, HubNotFoundError, "no such file, so it holds no prompt file")


@pytest.mark.parametrize("name", ["Config.json", "config.json ", "./config.json", "config.json/config.json"])
def test_names_are_exact(local, vit, name):
    local.hub.create(REPO, "hf_write", private=False).put({name: good()[0], "prompts.safetensors": good()[1]})
    refused(local, vit, HubNotFoundError, "no such file")


@pytest.mark.parametrize("size", [2**20 + 1, 10**13])
def test_a_large_config_is_not_downloaded(local, vit, size):
    repository = serve(local, good())
    files = {**repository.at("main").files, "config.json": File(good()[0], lfs=False, said=size)}
    repository.refs["main"] = repository.add(files, "large", None).oid
    refused(local, vit, PromptFileFormatError, rf"config\.json has {size} bytes, at most 1048576")
    assert {request.method for request in local.requests} == {"HEAD"}


@pytest.mark.parametrize("size", [0, 1, len(good()[1]) - 1, len(good()[1]) + 1, 10**13])
def test_weights_of_another_size_are_not_downloaded(local, vit, size):
    repository = serve(local, good())
    files = {**repository.at("main").files, "prompts.safetensors": File(good()[1], lfs=True, said=size)}
    repository.refs["main"] = repository.add(files, "large", None).oid
    refused(local, vit, PromptFileIntegrityError, rf"has {size} bytes, config\.json says")
    assert not any(request.host.startswith("localhost") for request in local.requests)


def test_weights_of_absurd_size_are_not_even_looked_at(local, vit):
    serve(local, CASES["tensors absurd"][0]())
    refused(local, vit, PromptFileTensorError, "at most 17179869184 are read")
    assert not any("prompts.safetensors" in request.path for request in local.requests)


def test_a_git_lfs_pointer_for_weights(local, vit):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5000\n"
    serve(local, (good()[0], pointer))
    refused(local, vit, PromptFileIntegrityError, "LFS pointer")


def test_a_config_in_large_file_storage_is_a_file_like_any_other(local, vit):
    repository = serve(local, good())
    files = {**repository.at("main").files, "config.json": File(good()[0], lfs=True)}
    repository.refs["main"] = repository.add(files, "lfs", None).oid
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    files["config.json"] = File(b"\x80\x04cos\nsystem\n.", lfs=True)
    repository.refs["main"] = repository.add(files, "pickle", None).oid
    refused(local, vit, PromptFileFormatError, "not strict JSON")


BACKBONES = {
    "an address": {"architecture": "hf_hub:evil/model", "pretrained_tag": "x"},
    "a folder": {"architecture": "local-dir:/tmp", "pretrained_tag": "x"},
    "a class": {"architecture": "os.system", "pretrained_tag": "x"},
    "another library": {"library": "subprocess"},
    "a million blocks": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"depth": 10**6}},
    "a huge image": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"img_size": 10**6}},
    "a file": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"checkpoint_path": "/x"}},
    "a callable": {"architecture": "test_vit", "pretrained_tag": "r160_in1k", "model_args": {"norm_layer": "eval"}},
    "a hub id of its own": {"hub_id": "evil/model", "architecture": "x", "pretrained_tag": "x"},
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_no_backbone_of_their_choice_is_built(local, backbone):
    forgery = Forgery.start()
    forgery.config["backbone"].update(backbone)
    serve(local, forgery.sync().bytes())
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
    serve(local, good(), {**LURES, "README.md": card})
    LongTailPromptAdapter.from_pretrained(REPO, vit).unwrap()
    assert not any("README" in request.path for request in local.requests)


def test_redirects_to_other_places_stay_without_a_token(local, vit):
    """The Location of large files is the server's word; the token does not follow it."""
    serve(local, good())
    LongTailPromptAdapter.from_pretrained(REPO, vit, token="hf_write").unwrap()
    assert all(request.token is None for request in local.requests if request.host.startswith("localhost"))


def test_the_refused_are_refused_from_the_cache_too(local, vit):
    serve(local, CASES["NaN"][0]())
    for options in ({}, {}, {"local_files_only": True}):
        with pytest.raises(PromptFileTensorError, match="NaN or infinity"):
            LongTailPromptAdapter.from_pretrained(REPO, vit, **options)
    with pytest.raises(HubError, match="no such revision"):
        LongTailPromptAdapter.from_pretrained(REPO, vit, revision="../../etc")
