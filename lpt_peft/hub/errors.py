"""Conversion of huggingface_hub's exceptions to `HubError`, with a cure and without tokens in the message.

The exceptions differ between versions (based on `requests` in 0.x, `httpx` in 1.x, `httpx2` in 2.x), and not all of
them are `OSError`. Not here: the requests (`pull.py`, `push.py`).
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
# Base classes of transport errors in each of these libraries.
_TRANSPORT: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
# Exception, our class, text of the message; subclasses stand before their base classes.
_CAUSES: tuple[tuple[type[BaseException], type[LPTError], str], ...] = (
    (HFValidationError, ConfigError, 'the name of a repository is "owner/name" ({reason}).'),
    (
        GatedRepoError,
        HubAccessError,
        "access is gated. Request it at {endpoint}/{repo_id}, then {log_in} of the account that has it.",
    ),
    (
        RepositoryNotFoundError,
        HubNotFoundError,
        "the repository does not exist, or it is private. Check the name; if it is private, {log_in}.",
    ),
    (
        RevisionNotFoundError,
        HubNotFoundError,
        "the revision does not exist. Give an existing branch, tag or commit.",
    ),
    (OfflineModeIsEnabled, HubUnavailableError, "the client is in offline mode. Unset HF_HUB_OFFLINE."),
    (
        LocalEntryNotFoundError,
        HubUnavailableError,
        "it is not in the local cache, and no request was made (local_files_only=True) or the Hub was not reached. "
        "Load it once with a connection.",
    ),
    (
        EntryNotFoundError,
        HubNotFoundError,
        "the file does not exist, so there is no prompt file. Check revision= and subfolder=.",
    ),
)
_ERRNO = re.compile(r"\[(?:Errno|WinError) -?\d+\] ")
_OUT_OF_ORDER = frozenset((408, 429, 500, 502, 503, 504))
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO))


def check_token(token: Token) -> None:
    """Refuse a token that an HTTP header cannot carry: the HTTP libraries would print it in their error.

    Raises:
        ConfigError: It contains white space or non-ASCII characters.
    """
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("token= contains white space or other characters that no token has. Copy it again.")


@contextmanager
def hub_errors(action: str, repo_id: str, token: Token) -> Iterator[None]:
    """Convert exceptions of huggingface_hub to `HubError`; errors of the local disk stay as they are.

    Args:
        action: Beginning of the message: "Reading prompts.safetensors of".
        repo_id: The repository.
        token: The token given, which is removed from messages.

    Raises:
        HubError: A request failed.
        ConfigError: `repo_id` is not the name of a repository.
    """
    try:
        yield
    except LPTError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in _DISK or _is_local(error)):
            raise
        kind, cause = _cause(error, repo_id)
        message = f"{action} {repo_id} on the Hugging Face Hub failed: {cause}"
        clean = _without_token(message, token)
        # An exception that quotes the token must not appear in the traceback either.
        raise kind(clean) from (None if clean != message or _quotes(error, token) else error)


def call_with_timeout(seconds: float, call: Callable[[], T], action: str) -> T:
    """Return the result of `call`, or raise after `seconds`: the client itself waits forever for some answers.

    Raises:
        HubUnavailableError: No answer in time; the request may still take effect.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # raised in the calling thread below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="lpt_peft push")
    thread.start()
    try:
        thread.join(seconds)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{action} was interrupted, but may still take effect on the Hugging Face Hub. Look at the repository."
        ) from stop
    if thread.is_alive():
        raise HubUnavailableError(
            f"{action}: no answer from the Hugging Face Hub for {seconds:g} s, but the request may still take effect. "
            "Look at the repository, then try again, with a larger timeout= if the connection is slow."
        )
    if raised:
        raise raised[0]
    return result[0]


def _cause(error: BaseException, repo_id: str) -> tuple[type[LPTError], str]:
    """Our class and the text of the message."""
    for raised, kind, text in _CAUSES:
        if isinstance(error, raised):
            return kind, text.format(endpoint=constants.ENDPOINT, repo_id=repo_id, log_in=_LOG_IN, reason=_short(error))
    if isinstance(error, HfHubHTTPError):
        return _status(error)
    if isinstance(error, ValueError) and "README.md" in str(error):
        return ConfigError, f"the Hub refuses the model card ({_short(error)}). Check license=, datasets= and tags=."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of uploads in threads
        return _cause(error.__cause__, repo_id)
    if isinstance(error, _TRANSPORT):
        return HubUnavailableError, f"there is no connection, or it broke ({_short(error)}). Try again."
    return HubError, f"the answer is not that of a Hub ({_short(error)}). Check HF_ENDPOINT and proxies."


def _status(error: Any) -> tuple[type[LPTError], str]:
    status = error.response.status_code
    reason = _short(getattr(error, "server_message", None) or error)
    if status == 401:
        return HubAccessError, f"the token is not valid (401: {reason}). Create a new token, then {_LOG_IN}."
    if status == 403:
        return (
            HubAccessError,
            f"the token lacks the permission (403: {reason}). Writing needs the write role.",
        )
    if status == 412:
        return (
            HubConflictError,
            "another user pushed meanwhile (412); nothing was overwritten. Push again.",
        )
    if status in _OUT_OF_ORDER:
        return HubUnavailableError, f"the Hub is out of order or busy ({status}). Try again later."
    return HubError, f"the Hub refused ({status}: {reason})."


def _short(error: object) -> str:
    """The beginning of a text on one line, with the class of an error."""
    text = _ERRNO.sub("", " ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) else text


def _is_local(error: OSError) -> bool:
    """Whether an error names a local file; errors of the Hub and a missing cache entry do not."""
    return error.filename is not None and not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError)


def _secret(token: Token) -> str | None:
    return token if isinstance(token, str) else get_token() if token is not False else None


def _without_token(text: str, token: Token) -> str:
    secret = _secret(token)
    return text.replace(secret, "[token]") if secret else text


def _quotes(error: BaseException | None, token: Token) -> bool:
    """Whether the token is in the text of an error or of its causes."""
    secret = _secret(token)
    while secret and error is not None:
        if secret in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
