"""`lpt-peft pull REPO FOLDER`: a prompt file from the Hugging Face Hub into a folder."""

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
    """Fetch the two files of a prompt file, check them as a reader does, and write them.

    Args:
        repo: owner/name.
        folder: Made if need be; nothing in it but the two files is touched.
        revision: Branch, tag or commit.
        subfolder: Where in the repository.
        offline: Take what the cache holds, do not ask the Hub.
        as_json: Print one JSON object.
    """
    from lpt_peft.checkpoint import write_prompt_file
    from lpt_peft.hub import Place
    from lpt_peft.hub import pull as pull_files

    pulled = pull_files(Place(repo_id=repo, revision=revision, subfolder=subfolder, local_files_only=offline))
    write_prompt_file(folder, pulled.config, pulled.weights)
    if as_json:
        print(json.dumps({"commit": pulled.commit, "folder": str(folder)}))
    else:
        size = len(pulled.config) + len(pulled.weights)
        print(f"{folder}: config.json and prompts.safetensors of {repo} at {pulled.commit}, {size:,} bytes")
