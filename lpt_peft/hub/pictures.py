"""Pictures of a push: marked as those of this library, so that a later push overwrites no other picture."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from lpt_peft.errors import InputError, PromptFileFormatError
from lpt_peft.hub.card.model_card import CARD_NAME, picture_link
from lpt_peft.hub.location import HubLocation
from lpt_peft.hub.pull import pull_file

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = len(_SIGNATURE) + 25  # the chunk IHDR, which is the first
_MAX_BYTES = 2**23
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.png")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_MARK = _chunk(b"tEXt", b"Source\0lpt_peft")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Files of the repository that a push leaves as they are."""

    card: str | None = None
    """Text of README.md; None if it is missing or was not read."""
    pictures: frozenset[str] = frozenset()
    """Names of pictures that this library did not write."""


def check_pictures(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Check pictures and mark them.

    Raises:
        InputError: A name or a content is not that of a PNG file.
    """
    for name, data in pictures.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f'pictures: the name {name!r:.80} must be like "accuracy.png", with letters and digits.')
        if not isinstance(data, bytes) or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
            raise InputError(f"pictures: {name} must be the bytes of a PNG file, such as those that savefig writes.")
        if len(data) > _MAX_BYTES - len(_MARK):
            raise InputError(f"pictures: {name} has {len(data):,} bytes, at most {_MAX_BYTES:,}: draw it smaller.")
    return {name: data if _is_own(data) else data[:_HEADER] + _MARK + data[_HEADER:] for name, data in pictures.items()}


def kept_files(location: HubLocation, existing: Collection[str], pictures: Mapping[str, bytes]) -> Kept:
    """Read README.md and the pictures of the same names, as far as the repository has them.

    Args:
        location: Repository, commit and folder.
        existing: Paths of its files.
        pictures: What will be pushed.

    Raises:
        HubError: The Hub did not deliver a file.
    """
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    foreign = {name for name in pictures if prefix + name in existing and not _is_own(_read(location, name))}
    card = _read(replace(location, subfolder=None), CARD_NAME) if CARD_NAME in existing else None
    return Kept(card=None if card is None else card.decode("utf-8", "replace"), pictures=frozenset(foreign))


def kept_notes(kept: Kept, repo_id: str, card: str, pictures: Collection[str]) -> Iterator[str]:
    """Describe what a push did not do.

    Args:
        kept: Files that stayed.
        repo_id: Repository.
        card: The card for these prompts.
        pictures: Paths of the pictures that were uploaded.
    """
    for name in sorted(kept.pictures):
        yield (
            f"{repo_id} has a file {name} that lpt_peft did not write: it stays, and the new picture was not uploaded. "
            "Rename that file, or push to a subfolder."
        )
    if kept.card is None or kept.card == card:
        return
    hidden = [path for path in pictures if f"({picture_link(path).rpartition('(')[2]}" not in kept.card]
    text = f"{repo_id} has a README.md, which stays as it is"
    if hidden:
        links = " ".join(map(picture_link, hidden))
        yield f"{text} and does not show {', '.join(hidden)}. Add to it: {links}"
    else:
        yield f"{text} and may describe earlier prompts. Delete it on the Hub to get a new card with the next push."


def _read(location: HubLocation, name: str) -> bytes:
    try:
        return pull_file(location, name, _MAX_BYTES) or b""
    except PromptFileFormatError:  # larger than any of ours
        return b""


def _is_own(data: bytes) -> bool:
    return data.startswith(_SIGNATURE) and data[_HEADER:].startswith(_MARK)
