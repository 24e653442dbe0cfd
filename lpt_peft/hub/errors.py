"""The one place where what huggingface_hub raises becomes a `HubError` with a cure; tokens never get into a message.

Its errors differ between versions: `requests` beneath 0.x, `httpx` beneath 1.x, `httpx2` beneath 2.x, and not all of
them are `OSError`. Not here: what is asked of the Hub (`pull.py`, `push.py`).
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lpt_peft.errors import (
    ConfigError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    LPTError,
)

Token = str | bool | None
T = TypeVar("T")

_LOG_IN = "log in (hf auth login), set HF_TOKEN or pass token="
# The classes that transport errors have in common, whatever library is beneath.
_TRANSPORT: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
# What is raised, our class, what the message says; a class stands before those it derives from.
_CAUSES: tuple[tuple[type[BaseException], type[LPTError], str], ...] = (
    (HFValidationError, ConfigError, 'a repository is named "owner/name" ({said}).'),
    (
        GatedRepoError,
        HubAccessError,
        "access is gated. Ask for it at {endpoint}/{repo_id}, then {log_in} of the account that has it.",
    ),
    (
        RepositoryNotFoundError,
        HubNotFoundError,
        "there is no such repository, or it is private. Check the name (a folder of that name is not here either); if "
        "it is private, {log_in}.",
    ),
    (
        RevisionNotFoundError,
        HubNotFoundError,
        "it has no such revision. Give a branch, tag or commit that it has.",
    ),
    (OfflineModeIsEnabled, HubUnavailableError, "the client is told to stay offline. Unset HF_HUB_OFFLINE."),
    (
        LocalEntryNotFoundError,
        HubUnavailableError,
        "it is not in the local cache, and the Hub was not asked (local_files_only=True) or not reached. Load it once "
        "with a connection.",
    ),
    (
        EntryNotFoundError,
        HubNotFoundError,
        "it has no such file, so it holds no prompt file there. Check revision= and subfolder=.",
    ),
)
_OUT_OF_ORDER = frozenset((408, 429, 500, 502, 503, 504))
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO))


def check_token(token: Token) -> None:
    """Refuse a token that no HTTP header can carry: the libraries beneath would print it in their error.

    Raises:
        ConfigError: It holds white space or characters beyond ASCII.
    """
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("token= holds white space or other characters that no token has. Copy it anew.")


@contextmanager
def hub_errors(doing: str, repo_id: str, token: Token) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into a `HubError`; errors of the local disk stay as they are.

    Args:
        doing: What is being tried, for the message: "Reading config.json of".
        repo_id: Of which repository.
        token: What was given; it is taken out of messages.

    Raises:
        HubError: Anything went wrong between here and the Hub.
        ConfigError: `repo_id` is not one.
    """
    try:
        yield
    except LPTError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in _DISK or _is_local(error)):
            raise
        kind, cause = _cause(error, repo_id)
        message = f"{doing} {repo_id} on the Hugging Face Hub failed: {cause}"
        clean = _without_token(message, token)
        # An error that quotes the token must not be shown beneath ours either.
        raise kind(clean) from (None if clean != message or _quotes(error, token) else error)


def within(seconds: float, call: Callable[[], T], doing: str) -> T:
    """The result of `call`, or an error after `seconds`: the client itself waits for ever for some answers.

    Raises:
        HubUnavailableError: No answer in time; the request may still arrive later.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed to the caller below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="lpt_peft push")
    thread.start()
    try:
        thread.join(seconds)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{doing} was interrupted; the Hugging Face Hub may still do what it was asked. Look at the repository."
        ) from stop
    if thread.is_alive():
        raise HubUnavailableError(
            f"{doing}: the Hugging Face Hub has not answered for {seconds:g} s, and may still do what it was asked. "
            "Look at the repository, then try again, with a larger timeout= if the line is slow."
        )
    if raised:
        raise raised[0]
    return result[0]


def _cause(error: BaseException, repo_id: str) -> tuple[type[LPTError], str]:
    """Class and text for an error."""
    for raised, kind, text in _CAUSES:
        if isinstance(error, raised):
            return kind, text.format(endpoint=constants.ENDPOINT, repo_id=repo_id, log_in=_LOG_IN, said=_short(error))
    if isinstance(error, HfHubHTTPError):
        return _status(error)
    if isinstance(error, ValueError) and "README.md" in str(error):
        return ConfigError, f"the Hub refuses the model card ({_short(error)}). Check license=, datasets= and tags=."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # what uploads in threads raise
        return _cause(error.__cause__, repo_id)
    if isinstance(error, _TRANSPORT):
        return HubUnavailableError, f"no connection, or it broke ({_short(error)}). Try again."
    return HubError, f"the answer was not understood ({_short(error)}). Is HF_ENDPOINT, or a proxy, a Hub?"


def _status(error: Any) -> tuple[type[LPTError], str]:
    status = error.response.status_code
    said = _short(getattr(error, "server_message", None) or error)
    if status == 401:
        return HubAccessError, f"the token is not valid (401: {said}). Make a new one, then {_LOG_IN}."
    if status == 403:
        return HubAccessError, f"this token may not do that (403: {said}). Writing needs a token with the write role."
    if status == 412:
        return HubConflictError, "someone else pushed meanwhile (412); nothing was overwritten. Look, then push again."
    if status in _OUT_OF_ORDER:
        return HubUnavailableError, f"the Hub is out of order or busy ({status}). Try again later."
    return HubError, f"the Hub refused ({status}: {said})."


def _short(error: object) -> str:
    """The beginning of a text, on one line, with the class of an error."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) else text


def _is_local(error: OSError) -> bool:
    """A file of this machine is named; errors of the Hub and the missing cache entry name none."""
    return error.filename is not None and not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError)


def _secret(token: Token) -> str | None:
    return token if isinstance(token, str) else get_token() if token is not False else None


def _without_token(text: str, token: Token) -> str:
    secret = _secret(token)
    return text.replace(secret, "[token]") if secret else text


def _quotes(error: BaseException | None, token: Token) -> bool:
    """The token is in the text of an error or of one beneath it."""
    secret = _secret(token)
    while secret and error is not None:
        if secret in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
