"""Permissions to read and write, their messages, and the places that the token is sent to."""

from __future__ import annotations

import io
import logging
import traceback

import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import (
    ConfigError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    LPTError,
    PromptFileIntegrityError,
)
from lpt_peft.hub import read_prompts
from tests.checkpoint.adapters import IMAGES, tiny_adapter
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO


@pytest.fixture
def private(local):
    tiny_adapter().push_to_hub(REPO, private=True)
    local.requests.clear()
    return local


def test_a_private_repository_looks_missing(private, monkeypatch):
    read_prompts(REPO)
    for token in ("hf_stranger", False):
        with pytest.raises(HubNotFoundError, match=r"repository does not exist, or it is private.*hf auth login"):
            read_prompts(REPO, token=token)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubNotFoundError, match="or it is private"):
        read_prompts(REPO)
    with pytest.raises(FileNotFoundError):  # as a caller would expect
        read_prompts(REPO)
    read_prompts(REPO, token="hf_read")


def test_a_gated_repository(local):
    tiny_adapter().push_to_hub(REPO)
    local.hub.repositories[REPO].gated = True
    for token in ("hf_stranger", False):
        with pytest.raises(HubAccessError, match=rf"gated. Request it at {local.endpoint}/{REPO}"):
            read_prompts(REPO, token=token)
    read_prompts(REPO, token="hf_write")


def test_wrong_and_read_only_tokens(local):
    tiny_adapter().push_to_hub(REPO)
    with pytest.raises(HubAccessError, match=r"token is not valid.*Invalid credentials.*Create a new token"):
        read_prompts(REPO, token="hf_wrong")
    with pytest.raises(HubAccessError, match="token is not valid"):
        tiny_adapter().push_to_hub(REPO, token="hf_wrong")
    with pytest.raises(HubAccessError, match=r"lacks the permission.*write role"):
        tiny_adapter(seed=1).push_to_hub(REPO, token="hf_read")
    with pytest.raises(HubAccessError, match="lacks the permission"):
        tiny_adapter(seed=1).push_to_hub("me/new", token="hf_read")
    with pytest.raises(HubAccessError, match="lacks the permission"):
        tiny_adapter(seed=1).push_to_hub(REPO, token="hf_stranger")
    with pytest.raises(PermissionError):  # as a caller would expect
        tiny_adapter(seed=1).push_to_hub(REPO, token=False)
    assert len(local.hub.repositories[REPO].history) == 2
    assert local.hub.repositories.keys() == {REPO}


@pytest.mark.parametrize("repo_id", ["a/b/c", "-a/b", "a..b", "a/b.git", "", "a b", "../x", "a--b"])
def test_invalid_names(local, repo_id):
    with pytest.raises(ConfigError, match="owner/name"):
        tiny_adapter().push_to_hub(repo_id)
    assert local.requests == []
    with pytest.raises(LPTError):
        read_prompts(repo_id)
    assert local.requests == []


def test_arguments(local):
    with pytest.raises(ConfigError, match="give only one"):
        read_prompts(REPO, local_files_only=True, force_download=True)
    with pytest.raises(ConfigError, match=r"refuses the model card.*Check license="):
        tiny_adapter().push_to_hub(REPO, license="not-a-license")
    with pytest.raises(ConfigError, match="commit_message"):
        tiny_adapter().push_to_hub(REPO, commit_message="")


# -- tokens -----------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_alone(private):
    tiny_adapter(seed=1).push_to_hub(REPO, token="hf_write")
    read_prompts(REPO, token="hf_write")
    elsewhere = [request for request in private.requests if request.host.startswith("localhost")]
    at_the_hub = [request for request in private.requests if not request.host.startswith("localhost")]
    assert {request.method for request in elsewhere} == {"PUT", "GET"}
    assert all(request.token is None for request in elsewhere)
    assert {request.token for request in at_the_hub} == {"hf_write"}
    assert all("hf_write" not in request.path for request in private.requests)
    assert all(b"hf_write" not in request.body for request in private.requests)


def test_false_sends_no_token(local):
    tiny_adapter().push_to_hub(REPO)
    local.requests.clear()
    read_prompts(REPO, token=False)
    assert {request.token for request in local.requests} == {None}


def everything_of(error):
    return "".join(traceback.format_exception(error))


def test_the_token_is_never_printed(local, capfd, monkeypatch):
    secret = "hf_wrong_1234567890"
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    logging.getLogger().addHandler(handler)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", local.endpoint)
    tiny_adapter().push_to_hub(REPO)
    shown = []
    for kind in ("drop", 500, 401, 403, "html"):
        for call in (
            lambda: read_prompts(REPO, token=secret),
            lambda: tiny_adapter(seed=1).push_to_hub(REPO, token=secret),
        ):
            with local.fault("GET", ".", kind), local.fault("HEAD", ".", kind), local.fault("POST", ".", kind):
                with pytest.raises(HubError) as caught:
                    call()
                shown.append(everything_of(caught.value))
    logging.getLogger().removeHandler(handler)
    streams = capfd.readouterr()
    assert secret not in "".join(shown) + log.getvalue() + streams.out + streams.err


def test_a_server_that_echoes_the_token_is_not_quoted(local):
    secret = "hf_wrong_1234567890"

    def echo(request):
        local.hub.accounts.tokens.pop(secret, None)
        local.hub.accounts.who = lambda token: (_ for _ in ()).throw(refused(f"bad token {token}"))

    from tests.hub.repositories import Refused  # noqa: PLC0415

    refused = lambda text: Refused(403, None, text)  # noqa: E731
    local.before = echo
    with pytest.raises(HubAccessError, match=r"bad token \[token\]") as caught:
        read_prompts(REPO, token=secret)
    assert secret not in everything_of(caught.value)


@pytest.mark.parametrize("token", ["hf_secret\n", " hf_secret", "hf_\u00e9secret", ""])
def test_a_token_that_no_header_can_carry(local, token):
    for call in (lambda: read_prompts(REPO, token=token), lambda: tiny_adapter().push_to_hub(REPO, token=token)):
        with pytest.raises(ConfigError, match="Copy it again") as caught:
            call()
        assert "secret" not in str(caught.value)
    assert local.requests == []


# -- offline ----------------------------------------------------------------------------------------------


def test_the_cache_alone(local):
    tiny_adapter().push_to_hub(REPO)
    with pytest.raises(HubUnavailableError, match=r"not in the local cache.*local_files_only=True"):
        read_prompts(REPO, local_files_only=True)
    assert [request.method for request in local.requests].count("HEAD") == 0
    read_prompts(REPO)
    local.requests.clear()
    twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), local_files_only=True)
    assert torch.equal(twin(IMAGES), tiny_adapter()(IMAGES))
    assert local.requests == []
    with pytest.raises(HubUnavailableError, match="not in the local cache"):
        read_prompts(REPO, local_files_only=True, revision="other")


def test_no_connection_with_and_without_cache(local):
    tiny_adapter().push_to_hub(REPO)
    tiny_adapter(seed=1).push_to_hub("me/second")
    read_prompts(REPO)
    for kind in ("drop", "reset", 503, 500):
        with local.fault("HEAD", ".", kind), local.fault("GET", ".", kind):
            assert read_prompts(REPO).phase == "group"
            with pytest.raises(
                HubUnavailableError, match=r"(is no connection|out of order).*The local cache does not hold it either"
            ):
                read_prompts("me/second")
            with pytest.raises(ConnectionError):  # as a caller would expect
                read_prompts(REPO, force_download=True)


def test_a_cache_without_the_file_or_with_a_damaged_file(local, tmp_path):
    tiny_adapter().push_to_hub(REPO)
    read_prompts(REPO, cache_dir=tmp_path / "cache")
    (weights,) = (tmp_path / "cache").rglob("prompts.safetensors")
    data = bytearray(weights.read_bytes())
    weights.unlink()
    with pytest.raises(HubUnavailableError, match=r"prompts\.safetensors.*not in the local cache"):
        read_prompts(REPO, cache_dir=tmp_path / "cache", local_files_only=True)
    data[-1] ^= 1
    weights.write_bytes(data)  # a plain file, as the client keeps it where there are no links
    with pytest.raises(PromptFileIntegrityError, match="a byte changed"):
        read_prompts(REPO, cache_dir=tmp_path / "cache", local_files_only=True)
    assert read_prompts(REPO, cache_dir=tmp_path / "cache").phase == "group"


def test_errors_of_the_local_disk_stay_as_they_are(local, tmp_path):
    tiny_adapter().push_to_hub(REPO)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught:
        read_prompts(REPO, cache_dir=tmp_path / "file")
    assert not isinstance(caught.value, LPTError)
