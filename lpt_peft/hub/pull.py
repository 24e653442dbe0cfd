"""Fetch the two files of a prompt file from the Hugging Face Hub, of one commit, through the client's own cache.

Sizes are looked at before anything is downloaded, and what arrived is compared with the hash that the Hub names (no
version of the client does this for plain downloads). Not here: what the bytes mean (`lpt_peft.checkpoint`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from lpt_peft._version import __version__
from lpt_peft.checkpoint import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, check_size, parse_config
from lpt_peft.checkpoint.files import open_regular
from lpt_peft.errors import (
    ConfigError,
    HubError,
    HubIntegrityError,
    HubUnavailableError,
    PromptFileFormatError,
)
from lpt_peft.hub.errors import Token, check_token, hub_errors

_ATTEMPTS = 3


@dataclass(frozen=True)
class Pulled:
    """The bytes of both files, of one commit; config.json is checked, the other file is not yet."""

    config: bytes
    weights: bytes
    commit: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a prompt file is on the Hub and how to get at it; the fields are huggingface_hub's own arguments."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None
    token: Token = None
    cache_dir: str | PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        check_token(self.token)
        check_subfolder(self.subfolder)
        if self.local_files_only and self.force_download:
            raise ConfigError("force_download=True asks the Hub, local_files_only=True forbids it: give one of them.")


def check_subfolder(subfolder: str | None) -> None:
    """A path inside the repository, or none.

    Raises:
        ConfigError: It is absolute or leaves the repository.
    """
    if subfolder is not None and not all(re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]+", part) for part in subfolder.split("/")):
        raise ConfigError(f'subfolder={subfolder!r} must be a path inside the repository, such as "prompts/places".')


def pull(place: Place) -> Pulled:
    """Fetch config.json, then the weights of the same commit.

    Without a connection, what the cache holds of the revision is taken.

    Raises:
        HubError: The Hub did not give them; the class tells why.
        PromptFileError: config.json is refused, or a size is beyond what it may be.
    """
    if place.local_files_only:
        return _from_cache(place)
    for _ in range(_ATTEMPTS):
        try:
            head = _head(place, CONFIG_NAME, place.revision)
        except HubUnavailableError as error:
            if place.force_download:
                raise
            try:
                return _from_cache(place)
            except HubUnavailableError:
                raise HubUnavailableError(f"{error} Nor is all of it in the local cache.") from error
        if head.size > MAX_CONFIG_BYTES:
            raise PromptFileFormatError(f"config.json has {head.size} bytes, at most {MAX_CONFIG_BYTES} are read.")
        # By the revision's name and not by commit: only so does the cache learn where a branch stood.
        config, commit = _download(place, CONFIG_NAME, place.revision, head, MAX_CONFIG_BYTES)
        if commit == head.commit:
            return Pulled(config, _weights(place, config, commit), commit)
        # A push came between: what was measured is not what was fetched.
    raise HubUnavailableError(f"{place.repo_id} changed {_ATTEMPTS} times while it was read. Give revision=, a commit.")


@dataclass(frozen=True)
class _Head:
    size: int
    etag: str | None
    commit: str


def _head(place: Place, name: str, revision: str | None) -> _Head:
    with hub_errors(f"Reading {name} of", place.repo_id, place.token):
        found: HfFileMetadata = get_hf_file_metadata(
            hf_hub_url(place.repo_id, name, subfolder=place.subfolder, revision=revision),
            token=place.token,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            library_name="lpt_peft",
            library_version=__version__,
        )
    if found.size is None or found.commit_hash is None:
        raise HubError(f"{place.repo_id}: what answers for the Hub tells no size or commit. Is HF_ENDPOINT a Hub?")
    return _Head(found.size, found.etag, found.commit_hash)


def _weights(place: Place, config: bytes, commit: str) -> bytes:
    content = parse_config(config)
    head = _head(place, WEIGHTS_NAME, commit)
    check_size(head.size, content)
    return _download(place, WEIGHTS_NAME, commit, head, head.size)[0]


def _from_cache(place: Place) -> Pulled:
    config, commit = _download(place, CONFIG_NAME, place.revision, None, MAX_CONFIG_BYTES)
    size = parse_config(config)["weights"]["size"]
    return Pulled(config, _download(place, WEIGHTS_NAME, commit, None, size)[0], commit)


def _download(place: Place, name: str, revision: str | None, head: _Head | None, limit: int) -> tuple[bytes, str]:
    """A file's bytes, one more than `limit` at most, and commit: from the Hub if `head` tells of it, else the cache."""
    for force in (place.force_download, True):
        with hub_errors(f"Downloading {name} of", place.repo_id, place.token):
            path = hf_hub_download(
                place.repo_id,
                name,
                subfolder=place.subfolder,
                revision=revision,
                token=place.token,
                cache_dir=None if place.cache_dir is None else Path(place.cache_dir),
                local_files_only=head is None,
                force_download=force,
                library_name="lpt_peft",
                library_version=__version__,
            )
        commit = _commit(Path(path), place.subfolder)
        with open_regular(Path(path)) as (stream, _):
            data = stream.read(limit + 1)
        if head is None or commit != head.commit or _is(data, head.etag):
            return data, commit
        # The client leaves a file be that is no link to its store, even when it downloads anew.
        Path(path).unlink(missing_ok=True)
    raise HubIntegrityError(
        f"{name} of {place.repo_id} arrived damaged twice: its hash is not the one the Hub names. Nothing was loaded; "
        "look for a proxy that changes downloads, then try again."
    )


def _commit(path: Path, subfolder: str | None) -> str:
    """The commit in a path of the client's cache, .../snapshots/<commit>/<subfolder>/<name>."""
    return path.parents[len(subfolder.split("/")) if subfolder else 0].name


def _is(data: bytes, etag: str | None) -> bool:
    """The bytes have this ETag: the sha256 of a large file, git's sha1 of others; a mirror's own form says nothing."""
    if etag and re.fullmatch(r"[0-9a-f]{64}", etag):
        return hashlib.sha256(data).hexdigest() == etag
    if etag and re.fullmatch(r"[0-9a-f]{40}", etag):
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == etag
    return True
