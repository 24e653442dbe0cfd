"""Location of a prompt file on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike

from lpt_peft.errors import ConfigError
from lpt_peft.hub.errors import Token, check_token


@dataclass(frozen=True, kw_only=True)
class HubLocation:
    """Location of a prompt file and access to it; the fields are huggingface_hub's own arguments.

    Raises:
        ConfigError: A field is out of range, or two contradict each other.
    """

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
            raise ConfigError(
                "force_download=True requires a request to the Hub, local_files_only=True forbids it: give only one."
            )


def check_subfolder(subfolder: str | None) -> None:
    """Check that a subfolder is a path inside its folder or repository, or None.

    Raises:
        ConfigError: It is absolute, empty, or leaves the folder.
    """
    if subfolder is not None and not all(re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]+", part) for part in subfolder.split("/")):
        raise ConfigError(
            f'subfolder={subfolder!r} must be a path inside the folder or repository, such as "prompts/places".'
        )
