"""`lpt-peft push FOLDER REPO`: push a prompt file to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import tyro

from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError


def push(
    folder: tyro.conf.Positional[Path],
    repo: tyro.conf.Positional[str],
    /,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str = "Upload prompts with lpt-peft",
    license: str | None = None,
    dataset: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    as_json: Json = False,
) -> None:
    """Push a prompt file, and a model card if the repository has none. Log in first: hf auth login, or HF_TOKEN.

    Args:
        folder: A prompt file, or the output folder of a run, of which the prompts are sent, and a picture of the
            accuracy of each class.
        repo: owner/name; created if missing.
        revision: Branch, created if missing.
        subfolder: Folder inside the repository.
        private: If the repository is created, hide it from others.
        create_pr: Open a pull request instead of committing.
        message: First line of the commit.
        license: License for the model card.
        dataset: Hub id of the training data, for the model card; may be given several times.
        as_json: Print one JSON object.
    """
    from lpt_peft._run_folder import model_folder, prompt_folder
    from lpt_peft.checkpoint import read_prompt_file
    from lpt_peft.cli.common.run_card import run_card
    from lpt_peft.cli.common.streams import print_json
    from lpt_peft.hub import push as push_content
    from lpt_peft.recipe import TrainSettings

    if (model := model_folder(folder)) is not None:
        raise ConfigError(
            f"{folder} holds no prompts: push sends prompt files, and {model} holds the weights of a method without "
            f"prompts. Upload that folder with the Hub's own command: hf upload {repo} {model}"
        )
    content = read_prompt_file(prompt_folder(folder))
    results, pictures = run_card(folder, content)
    info = push_content(
        content,
        repo,
        revision=revision,
        subfolder=subfolder,
        private=private or None,
        create_pr=create_pr,
        commit_message=message,
        license=license,
        datasets=dataset,
        results=results,
        default_recipe=TrainSettings().resolved().to_dict(),
        pictures=pictures,
    )
    if as_json:
        print_json({"commit": info.oid, "url": str(info.commit_url), "pull_request": info.pr_url})
    else:
        print(f"{info.pr_url or info.commit_url}")
