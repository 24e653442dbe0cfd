"""Pushing of prompt files to the Hugging Face Hub: one atomic commit, with a model card if the repository has none.

Not here: what the files contain (`lpt_peft.checkpoint`), the text of the card (`lpt_peft.hub.card`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from lpt_peft._version import __version__
from lpt_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME, PromptContent, encode
from lpt_peft.checkpoint.files import foreign_config, is_own_config
from lpt_peft.errors import ConfigError, HubConflictError, PromptFileFormatError
from lpt_peft.hub.card import CARD_NAME, CardOptions, model_card, results_of_split
from lpt_peft.hub.errors import Token, call_with_timeout, check_token, hub_errors
from lpt_peft.hub.location import HubLocation, check_subfolder
from lpt_peft.hub.pictures import Kept, check_pictures, kept_files, kept_notes
from lpt_peft.hub.pull import pull_copy


def push(
    content: PromptContent,
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload prompts with lpt_peft",
    commit_description: str | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    tags: str | Sequence[str] = (),
    base_model: str | None = None,
    results: Mapping[str, Any] | None = None,
    default_recipe: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    timeout: float = 300.0,
) -> CommitInfo:
    """Commit a prompt file to a repository.

    Nothing else in the repository changes: an existing README.md and other files stay, and a `config.json` of another
    library is never overwritten. If nothing would change, there is no commit. If another user pushes between the
    listing and the commit, nothing is overwritten. A warning names pictures that are not uploaded, because the
    repository has another file of that name, or not shown, because it has a README.md without them.

    Args:
        content: What to push.
        repo_id: "owner/name", or "name" under the token's account; created if missing.
        revision: Branch, created if missing; None is "main".
        subfolder: Folder inside the repository, for several prompt files or beside another model.
        token: True or None for the token of the login, False for none, or the token itself.
        private: For a repository that is created; an existing repository stays as it is.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        license: For the card, as the Hub names it.
        datasets: Hub ids of the training data, for the card.
        tags: More tags for the card.
        base_model: Hub id of the backbone; None lets the card find it, if the weights prove it.
        results: Content of `results.json` of the run, for the card.
        default_recipe: Defaults of the settings in `training["recipe"]`, which the card then leaves out.
        pictures: PNG files by name, such as "accuracy.png", beside the prompt file; the card shows them.
        timeout: Seconds for each step (repository, listing, commit); the client itself may wait forever.

    Returns:
        The client's `CommitInfo`: `oid`, `commit_url`, `pr_url`.

    Raises:
        InputError, StateError: The content cannot be saved, a picture is not a PNG file, or `results` are incomplete or
            describe other prompts; nothing was sent.
        HubConflictError: The repository holds another library's `config.json`, or another user pushed meanwhile.
        HubError: The Hub refused or could not be reached; the commit is complete or does not exist.
        KeyboardInterrupt: Ctrl-C; a request that was sent may still take effect.
        ConfigError: An argument is out of range.
    """
    check_token(token)
    check_subfolder(subfolder)
    if create_pr and revision not in (None, "main"):
        raise ConfigError("create_pr=True opens a pull request against main: leave revision= out.")
    if not commit_message.strip():
        raise ConfigError("commit_message must not be empty; leave it out for the default text.")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigError(f"timeout={timeout!r} must be a number of seconds greater than 0.")
    encoded, files = encode(content), check_pictures(pictures or {})
    options = CardOptions(
        license=license,
        datasets=_as_tuple(datasets),
        tags=_as_tuple(tags),
        base_model=base_model,
        results=results,
        default_recipe=default_recipe,
    )
    results_of_split(content, results)  # raises before anything is sent
    api = HfApi(token=token, library_name="lpt_peft", library_version=__version__)
    with hub_errors("Creating", repo_id, token):
        full_id = call_with_timeout(
            timeout,
            lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id,
            f"Creating {repo_id}",
        )
    location = HubLocation(repo_id=full_id, revision=revision, subfolder=subfolder, token=token)
    with hub_errors("Listing the files of", full_id, token):
        info = call_with_timeout(timeout, lambda: _list_files(api, location), f"Listing the files of {full_id}")
    kept = Kept()
    if files:
        here = replace(location, revision=info.sha)
        with hub_errors("Reading the card and pictures of", full_id, token):
            kept = call_with_timeout(
                timeout, lambda: kept_files(here, _names(info), files), f"Reading the pictures of {full_id}"
            )
    prefix = f"{subfolder}/" if subfolder else ""
    files = {prefix + name: data for name, data in files.items() if name not in kept.pictures}
    shown = tuple(files)
    files |= {prefix + CONFIG_NAME: encoded.copy, prefix + WEIGHTS_NAME: encoded.weights}
    card = ""
    if kept.card is not None or CARD_NAME not in _names(info):
        card = model_card(content, full_id, options, subfolder=subfolder, revision=revision, pictures=shown)
    if CARD_NAME not in _names(info):
        files[CARD_NAME] = card.encode("utf-8")

    def commit() -> CommitInfo:
        return api.create_commit(
            full_id,
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )

    with hub_errors("Committing to", full_id, token):
        result = call_with_timeout(timeout, commit, f"Committing to {full_id}")
    for note in kept_notes(kept, full_id, card, shown):
        warnings.warn(note, UserWarning, stacklevel=2)
    return result


def _list_files(api: HfApi, location: HubLocation) -> Any:
    """List the files of the branch, created if missing, and check that the push may overwrite `config.json`."""
    branch = location.revision
    try:
        info = api.model_info(location.repo_id, revision=branch)
    except RevisionNotFoundError:
        if branch is None or branch.startswith("refs/"):  # a pull request cannot be created by its name
            raise
        _check_config(location, api.model_info(location.repo_id))  # before the branch exists: it starts as main
        api.create_branch(location.repo_id, branch=branch, exist_ok=True)
        info = api.model_info(location.repo_id, revision=branch)
    _check_config(location, info)
    return info


def _check_config(location: HubLocation, info: Any) -> None:
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    if prefix + CONFIG_NAME not in _names(info):
        return
    try:
        existing = pull_copy(
            HubLocation(repo_id=location.repo_id, revision=info.sha, subfolder=location.subfolder, token=location.token)
        )
    except PromptFileFormatError:  # larger than any copy of ours
        existing = b""
    if existing is not None and not is_own_config(existing):
        raise HubConflictError(foreign_config(f"{location.repo_id}, folder {location.subfolder or '/'},"))


def _names(info: Any) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
