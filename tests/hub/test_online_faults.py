"""Faults on every route of a push and of a pull: the right bytes, or one `HubError`; never half of anything."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import decode, encode
from lpt_peft.errors import HubError, HubIntegrityError, HubUnavailableError, PromptFileError
from lpt_peft.hub import Place, pull, push_files
from tests.conftest import tiny_vit
from tests.hub.conftest import IMAGES, REPO, adapter_of
from tests.hub.server import KINDS

ALWAYS = [(kind, 10**6) for kind in (*KINDS, 500, 404, 403, 400)]
ONCE = [(kind, 1) for kind in ("drop", "flip", 503)]


def with_faults(*more):
    faults = [*ALWAYS, *ONCE, *more]
    names = {1: "once", 10**6: "always"}
    return pytest.mark.parametrize(("kind", "times"), faults, ids=lambda value: names.get(value, value))


PULL = {
    "look at config": ("HEAD", "/config.json$"),
    "config": ("GET", "/config.json$"),
    "look at weights": ("HEAD", "/prompts.safetensors$"),
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
CONFIG, WEIGHTS = encode(adapter_of(1))


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def attempt(call):
    """What `call` returns, and its HubError, whose message is fit to be read; any other error is a failure."""
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
    if kind == "hang" and times > 1 and route in ("config", "weights"):
        times = 2  # the client tries six times, for a second each
    local.hub.create(REPO, "hf_write", private=False).put({"config.json": CONFIG, "prompts.safetensors": WEIGHTS})
    with local.fault(*PULL[route], kind, times) as fault:
        pulled, error = attempt(lambda: pull(Place(repo_id=REPO)))
        assert error or (pulled.config, pulled.weights) == (CONFIG, WEIGHTS)
        assert fault.met
    # Whatever happened, what is in the cache is right or is not trusted.
    pulled = pull(Place(repo_id=REPO))
    assert (pulled.config, pulled.weights) == (CONFIG, WEIGHTS)


@with_faults()
@pytest.mark.parametrize("route", PUSH)
def test_push(local, route, kind, times):
    repository = local.hub.create(REPO, "hf_write", private=False)
    old = repository.put({"notes.txt": b"here before"})
    with local.fault(*PUSH[route], kind, times) as fault:
        timeout = 0.5 if kind == "hang" else 30
        done, _ = attempt(lambda: push_files(CONFIG, WEIGHTS, REPO, timeout=timeout))
        assert fault.met
    head = repository.at("main")
    if (route, kind) == ("commit", "flip") and done:  # only TLS guards that; readers notice
        with contextlib.suppress(PromptFileError):
            pulled = pull(Place(repo_id=REPO))
            assert decode(pulled.config, pulled.weights).config == decode(CONFIG, WEIGHTS).config
    elif done or head.oid != old:  # a commit whose answer was lost is a commit
        assert head.parent == old
        assert head.files["config.json"].content == CONFIG
        assert head.files["prompts.safetensors"].content == WEIGHTS
    else:
        assert head.files.keys() == {".gitattributes", "notes.txt"}


def test_one_broken_answer_of_a_download_is_got_over(local):
    """What the client repeats by itself it still repeats beneath us."""
    local.hub.create(REPO, "hf_write", private=False).put({"config.json": CONFIG, "prompts.safetensors": WEIGHTS})
    with local.fault("GET", "^/objects/", "drop", 1) as fault:
        assert pull(Place(repo_id=REPO)).weights == WEIGHTS
        assert fault.met == 1


@pytest.mark.parametrize("name", ["config", "weights"])
def test_a_flipped_bit_is_fetched_once_more_then_refused(local, name):
    local.hub.create(REPO, "hf_write", private=False).put({"config.json": CONFIG, "prompts.safetensors": WEIGHTS})
    with local.fault(*PULL[name], "flip", 1) as fault:
        pulled = pull(Place(repo_id=REPO))
        assert (pulled.config, pulled.weights) == (CONFIG, WEIGHTS)
        assert fault.met == 1
    with local.fault(*PULL[name], "flip") as fault:
        with pytest.raises(HubIntegrityError, match="arrived damaged twice"):
            pull(Place(repo_id=REPO, force_download=True))
        assert fault.met == 2


def test_a_failed_load_changes_nothing(local):
    adapter_of(1).push_to_hub(REPO)
    adapter = adapter_of(2)
    vit, wanted = tiny_vit(), adapter(IMAGES)
    before = [type(module) for module in vit.modules()]
    for route in ("config", "weights"):
        with local.fault(*PULL[route], "flip"):
            with pytest.raises(HubError):
                LongTailPromptAdapter.from_pretrained(REPO, vit)
            with pytest.raises(HubError):
                adapter.load_prompts(REPO)
    assert [type(module) for module in vit.modules()] == before
    assert torch.equal(adapter(IMAGES), wanted)
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, vit)(IMAGES), adapter_of(1)(IMAGES))


def test_a_hub_that_says_nothing_is_given_up_in_time(local):
    with local.fault("POST", "/repos/create$", "hang"), pytest.raises(HubUnavailableError, match=r"0\.2 s.*timeout="):
        push_files(CONFIG, WEIGHTS, REPO, timeout=0.2)


def test_a_mirror_that_tells_no_size_or_commit_is_no_hub(local):
    with local.fault("HEAD", "/config.json$", "html"), pytest.raises(HubError, match="Is HF_ENDPOINT a Hub"):
        pull(Place(repo_id=REPO))
