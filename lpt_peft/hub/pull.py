"""Reading of prompt files from a folder or from the Hugging Face Hub, through the client's cache.

The size is checked before anything is downloaded, and the download is compared with the hash that the Hub states, which
no version of the client does for plain downloads. Not here: what the bytes mean (`lpt_peft.checkpoint`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from lpt_peft._version import __version__
from lpt_peft.checkpoint import CONFIG_NAME, MAX_FILE_BYTES, WEIGHTS_NAME, PromptContent, decode, read_prompt_file
from lpt_peft.checkpoint.files import MAX_COPY_BYTES, expand_user, open_regular
from lpt_peft.errors import (
    ConfigError,
    HubAccessError,
    HubError,
    HubIntegrityError,
    HubNotFoundError,
    HubUnavailableError,
    PromptFileFormatError,
)
from lpt_peft.hub.errors import Token, hub_errors
from lpt_peft.hub.location import HubLocation, check_subfolder

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Pulled:
    """Bytes of `prompts.safetensors`, not checked yet, and the commit that they belong to."""

    weights: bytes
    commit: str


def read_prompts(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> PromptContent:
    """Read a prompt file from a folder or from a repository of the Hub.

    Args:
        source: A folder if it exists (a `Path` is always a folder), else "owner/name".
        revision: Branch, tag or commit; for repositories only.
        subfolder: Folder inside the folder or repository.
        token: True or None for the token of the login, False for none, or the token itself.
        cache_dir: Cache of the client; None is its default.
        local_files_only: Load from the cache without a request to the Hub.
        force_download: Download again what the cache holds.

    Raises:
        PromptFileError: The file is refused; see `lpt_peft.checkpoint.decode` for the classes.
        HubError: The Hub did not deliver it.
        ConfigError: An argument is out of range.
    """
    if not isinstance(source, (str, PathLike)) or isinstance(fspath(source), bytes):
        value = repr(source) if isinstance(source, (str, bytes, int, list, type(None))) else type(source).__name__
        swapped = " Give it before the ViT: from_pretrained(source, vit)." if hasattr(source, "parameters") else ""
        raise ConfigError(f'source={value:.80} must be a folder, or "owner/name" on the Hugging Face Hub.{swapped}')
    if is_repository(source):
        location = HubLocation(
            repo_id=str(source),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        with folder_named(source):
            return decode(pull(location).weights)
    if revision is not None:
        raise ConfigError(f"revision={revision!r} is for repositories, and {source} is a folder: leave it out.")
    check_subfolder(subfolder)
    return read_prompt_file(expand_user(source) / (subfolder or ""))


@contextmanager
def folder_named(source: str | PathLike[str]) -> Iterator[None]:
    """Add to an error of the Hub that no folder has the name either: a path may have been meant.

    Raises:
        HubError: Of the same class, with the full path of the missing folder.
    """
    try:
        yield
    except (HubNotFoundError, HubUnavailableError, HubAccessError) as error:
        raise type(error)(
            f"No folder {Path(source).absolute()} exists, so {source} was taken for a repository. {error} For prompts "
            "on disk, correct the path."
        ) from error


def is_repository(source: str | PathLike[str]) -> bool:
    """Whether a source is a text that names no file or folder here and can name a repository."""
    if not isinstance(source, str) or _REPO_ID.fullmatch(source) is None:
        return False
    try:
        return not Path(source).exists()
    except OSError:  # a name too long for a folder
        return True


def pull(location: HubLocation) -> Pulled:
    """Fetch `prompts.safetensors`; without a connection, from the cache.

    Raises:
        HubError: The Hub did not deliver it.
        PromptFileFormatError: It is larger than a prompt file can be.
    """
    return Pulled(*_fetch(location, WEIGHTS_NAME, MAX_FILE_BYTES))


def pull_copy(location: HubLocation) -> bytes | None:
    """Fetch `config.json`, the readable copy; None if it is missing.

    Raises:
        HubError: The Hub did not deliver it.
        PromptFileFormatError: It is larger than such a copy can be.
    """
    return pull_file(location, CONFIG_NAME, MAX_COPY_BYTES)


def pull_file(location: HubLocation, name: str, most: int) -> bytes | None:
    """Fetch a file beside a prompt file; None if it is missing.

    Args:
        location: Repository and folder.
        name: Of the file.
        most: Bytes that are read.

    Raises:
        HubError: The Hub did not deliver it.
        PromptFileFormatError: It has more than `most` bytes.
    """
    try:
        return _fetch(location, name, most)[0]
    except HubNotFoundError:
        return None


@dataclass(frozen=True)
class _Head:
    size: int
    etag: str | None
    commit: str


def _fetch(location: HubLocation, name: str, most: int) -> tuple[bytes, str]:
    """Bytes and commit of a file."""
    if location.local_files_only:
        return _download(location, name, None, most)
    try:
        head = _head(location, name)
    except HubUnavailableError as error:
        if location.force_download:
            raise
        try:
            return _download(location, name, None, most)
        except HubUnavailableError:
            raise HubUnavailableError(f"{error} The local cache does not hold it either.") from error
    if head.size > most:
        raise PromptFileFormatError(f"{name} has {head.size} bytes, at most {most} are read.")
    return _download(location, name, head, most)


def _head(location: HubLocation, name: str) -> _Head:
    with hub_errors(f"Reading {name} of", location.repo_id, location.token):
        found: HfFileMetadata = get_hf_file_metadata(
            hf_hub_url(location.repo_id, name, subfolder=location.subfolder, revision=location.revision),
            token=location.token,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            library_name="lpt_peft",
            library_version=__version__,
        )
    if found.size is None or found.commit_hash is None:
        raise HubError(f"{location.repo_id}: the server states no size or commit of {name}. Is HF_ENDPOINT a Hub?")
    return _Head(found.size, found.etag, found.commit_hash)


def _download(location: HubLocation, name: str, head: _Head | None, most: int) -> tuple[bytes, str]:
    """Bytes, at most `most` + 1, and commit of a file: from the Hub if `head` is given, else from the cache."""
    for force in (location.force_download, True):
        with hub_errors(f"Downloading {name} of", location.repo_id, location.token):
            path = hf_hub_download(
                location.repo_id,
                name,
                subfolder=location.subfolder,
                revision=location.revision,
                token=location.token,
                cache_dir=None if location.cache_dir is None else expand_user(location.cache_dir, "cache_dir"),
                local_files_only=head is None,
                force_download=force,
                library_name="lpt_peft",
                library_version=__version__,
            )
        commit = _commit(Path(path), location.subfolder)
        with open_regular(Path(path)) as (stream, _):
            data = stream.read(most + 1)
        # After a push between the two requests the hash is that of another commit; the file's own hashes remain.
        if head is None or commit != head.commit or _has_etag(data, head.etag):
            return data, commit
        # The client keeps a file that is not a link to its store, even with force_download.
        Path(path).unlink(missing_ok=True)
    raise HubIntegrityError(
        f"{name} of {location.repo_id} arrived damaged twice: the Hub states another hash. Nothing was loaded; "
        "look for a proxy that changes downloads, then try again."
    )


def _commit(path: Path, subfolder: str | None) -> str:
    """The commit in a path of the client's cache, .../snapshots/<commit>/<subfolder>/<name>."""
    return path.parents[len(subfolder.split("/")) if subfolder else 0].name


def _has_etag(data: bytes, etag: str | None) -> bool:
    """Whether the bytes have this ETag: sha256 of a large file, git's sha1 of others; other forms are not compared."""
    if etag and re.fullmatch(r"[0-9a-f]{64}", etag):
        return hashlib.sha256(data).hexdigest() == etag
    if etag and re.fullmatch(r"[0-9a-f]{40}", etag):
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == etag
    return True
