"""`lpt-peft pull REPO FOLDER`: fetch a prompt file from the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from lpt_peft.cli.common.options import Json


def pull(
    repo: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[Path],
    /,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    offline: bool = False,
    as_json: Json = False,
) -> None:
    """Fetch a prompt file, check it and write it to a folder.

    Args:
        repo: owner/name.
        folder: Created if missing; its other files are not touched.
        revision: Branch, tag or commit.
        subfolder: Folder inside the repository.
        offline: Load from the cache without a request to the Hub.
        as_json: Print one JSON object.
    """
    from lpt_peft.checkpoint import decode, write_prompt_file
    from lpt_peft.hub import HubLocation
    from lpt_peft.hub import pull as pull_file

    location = HubLocation(repo_id=repo, revision=revision, subfolder=subfolder, local_files_only=offline)
    pulled = pull_file(location)
    write_prompt_file(folder, decode(pulled.weights))
    if as_json:
        print(json.dumps({"commit": pulled.commit, "folder": str(folder)}))
    else:
        print(f"{folder}: prompt file of {repo} at {pulled.commit}, {len(pulled.weights):,} bytes")
