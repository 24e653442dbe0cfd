"""Faults on every route of a push and a pull: the right bytes, or one `HubError`, and nothing incomplete."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode
from lpt_peft.errors import HubError, HubIntegrityError, HubUnavailableError, PromptFileError
from lpt_peft.hub import HubLocation, pull, push
from tests.checkpoint.adapters import IMAGES, tiny_adapter, tiny_content, tiny_encoded
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO
from tests.hub.server import KINDS

ALWAYS = [(kind, 10**6) for kind in (*KINDS, 500, 404, 403, 400)]
ONCE = [(kind, 1) for kind in ("drop", "flip", 503)]


def with_faults(*more):
    faults = [*ALWAYS, *ONCE, *more]
    names = {1: "once", 10**6: "always"}
    return pytest.mark.parametrize(("kind", "times"), faults, ids=lambda value: names.get(value, value))


PULL = {
    "size": ("HEAD", "/prompts.safetensors$"),
    "weights": ("GET", "^/objects/"),
}
PUSH = {
    "create": ("POST", "/repos/create$"),
    "info": ("GET", "^/api/models/"),
    "validate": ("POST", "/validate-yaml$"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch$"),
    "upload": ("PUT", "^/objects/"),
    "verify": ("POST", "/verify$"),
    "commit": ("POST", "/commit/"),
}
WEIGHTS, CONFIG, _ = tiny_encoded(1)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def attempt(call):
    """Result of `call`, and the message of its HubError, which is checked; any other error fails the test."""
    try:
        return call(), None
    except HubError as error:
        text = str(error)
    assert REPO in text
    assert "hf_write" not in text
    assert len(text) < 700
    return None, text


@with_faults((503, 10**6), (429, 10**6), ("reset", 1), ("truncate", 1), ("hang", 1), ("html", 1))
@pytest.mark.parametrize("route", PULL)
def test_pull(local, route, kind, times):
    if kind == "hang" and times > 1 and route == "weights":
        times = 2  # the client tries six times, for a second each
    local.hub.create(REPO, "hf_write", private=False).put({"prompts.safetensors": WEIGHTS})
    with local.fault(*PULL[route], kind, times) as fault:
        pulled, error = attempt(lambda: pull(HubLocation(repo_id=REPO)))
        assert error or pulled.weights == WEIGHTS
        assert fault.met
    # Afterwards the cache is right, or is not trusted.
    pulled = pull(HubLocation(repo_id=REPO))
    assert pulled.weights == WEIGHTS


@with_faults()
@pytest.mark.parametrize("route", PUSH)
def test_push(local, route, kind, times):
    repository = local.hub.create(REPO, "hf_write", private=False)
    old = repository.put({"notes.txt": b"here before"})
    with local.fault(*PUSH[route], kind, times) as fault:
        timeout = 0.5 if kind == "hang" else 30
        done, _ = attempt(lambda: push(tiny_content(1), REPO, timeout=timeout))
        assert fault.met
    head = repository.at("main")
    if (route, kind) == ("commit", "flip") and done:  # only TLS prevents that; readers find it
        with contextlib.suppress(PromptFileError):
            pulled = pull(HubLocation(repo_id=REPO))
            assert decode(pulled.weights).config == tiny_content(1).config
    elif done or head.oid != old:  # a commit whose answer was lost is a commit
        assert head.parent == old
        assert head.files["config.json"].content == CONFIG
        assert head.files["prompts.safetensors"].content == WEIGHTS
    else:
        assert head.files.keys() == {".gitattributes", "notes.txt"}


def test_the_client_repeats_a_broken_download(local):
    """The client's own retries still work."""
    local.hub.create(REPO, "hf_write", private=False).put({"prompts.safetensors": WEIGHTS})
    with local.fault("GET", "^/objects/", "drop", 1) as fault:
        assert pull(HubLocation(repo_id=REPO)).weights == WEIGHTS
        assert fault.met == 1


def test_a_flipped_bit_is_fetched_once_more_then_refused(local):
    local.hub.create(REPO, "hf_write", private=False).put({"prompts.safetensors": WEIGHTS})
    with local.fault(*PULL["weights"], "flip", 1) as fault:
        pulled = pull(HubLocation(repo_id=REPO))
        assert pulled.weights == WEIGHTS
        assert fault.met == 1
    with local.fault(*PULL["weights"], "flip") as fault:
        with pytest.raises(HubIntegrityError, match="arrived damaged twice"):
            pull(HubLocation(repo_id=REPO, force_download=True))
        assert fault.met == 2


def test_a_failed_load_changes_nothing(local):
    tiny_adapter(seed=1).push_to_hub(REPO)
    adapter = tiny_adapter(seed=2)
    vit, expected = tiny_vit(), adapter(IMAGES)
    before = [type(module) for module in vit.modules()]
    with local.fault(*PULL["weights"], "flip"):
        with pytest.raises(HubError):
            LongTailPromptAdapter.from_pretrained(REPO, vit)
        with pytest.raises(HubError):
            adapter.load_prompts(REPO)
    assert [type(module) for module in vit.modules()] == before
    assert torch.equal(adapter(IMAGES), expected)
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, vit)(IMAGES), tiny_adapter(seed=1)(IMAGES))


def test_a_silent_hub_times_out(local):
    with local.fault("POST", "/repos/create$", "hang"), pytest.raises(HubUnavailableError, match=r"0\.2 s.*timeout="):
        push(tiny_content(1), REPO, timeout=0.2)


def test_a_mirror_that_states_no_size_or_commit_is_refused(local):
    with local.fault("HEAD", "/prompts.safetensors$", "html"), pytest.raises(HubError, match="Is HF_ENDPOINT a Hub"):
        pull(HubLocation(repo_id=REPO))
