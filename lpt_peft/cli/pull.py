"""`lpt-peft pull REPO FOLDER`: fetch a prompt file from the Hugging Face Hub."""

from __future__ import annotations

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
        folder: Created if missing; its other files are not touched. Of the output folder of a run, its prompts/.
        revision: Branch, tag or commit.
        subfolder: Folder inside the repository.
        offline: Load from the cache without a request to the Hub.
        as_json: Print one JSON object.
    """
    from lpt_peft._run_folder import PROMPTS, SETTINGS
    from lpt_peft.checkpoint import decode, write_prompt_file
    from lpt_peft.cli.common.paths import check_new_folder
    from lpt_peft.cli.common.streams import print_json, print_text
    from lpt_peft.hub import HubLocation
    from lpt_peft.hub import pull as pull_file

    check_new_folder(folder)
    location = HubLocation(repo_id=repo, revision=revision, subfolder=subfolder, local_files_only=offline)
    pulled = pull_file(location)
    folder = folder / PROMPTS if (folder / SETTINGS).is_file() else folder
    write_prompt_file(folder, decode(pulled.weights))
    if as_json:
        print_json({"commit": pulled.commit, "folder": str(folder)})
    else:
        print_text(f"{folder}: prompt file of {repo} at {pulled.commit}, {len(pulled.weights):,} bytes")
