"""Put a prompt file on the Hugging Face Hub: one atomic commit of its two files, and a card where there is none.

Not here: what is in the files (`lpt_peft.checkpoint`) and on the card (`card.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from lpt_peft._version import __version__
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME, decode, encode
from lpt_peft.errors import ConfigError
from lpt_peft.hub.card import CARD_NAME, CardOptions, model_card
from lpt_peft.hub.errors import Token, check_token, hub_errors, within
from lpt_peft.hub.pull import check_subfolder


def push_files(
    config: bytes,
    weights: bytes,
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
    timeout: float = 300.0,
) -> CommitInfo:
    """Commit the bytes of a prompt file, which a reader would take, to a repository that is made if need be.

    Nothing else in the repository is touched: a README.md that is there stays, other files too. Where nothing would
    change, there is no commit. If someone pushes between the look and the commit, nothing is overwritten.

    Args:
        config: Bytes of config.json.
        weights: Bytes of prompts.safetensors.
        repo_id: "owner/name", or "name" under the token's account.
        revision: Branch, made if need be; None is "main".
        subfolder: For several prompt files in one repository.
        token: True or None for the one logged in with, False for none, or the token itself.
        private: For a repository that is made; one that is there stays as it is.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        license: For the card, as the Hub names it; none is made up.
        datasets: Hub ids of the training data, for the card; none is made up.
        tags: More tags for the card.
        base_model: Hub id of the backbone, where the card cannot find out that the weights are those of one.
        timeout: Seconds for each of the three steps (repository, look, commit); the client may wait for ever.

    Returns:
        The client's `CommitInfo`: `oid`, `commit_url`, `pr_url`.

    Raises:
        PromptFileError: A reader would refuse the bytes; nothing was sent.
        HubError: The Hub refused or could not be asked; the commit is there whole or not at all.
        KeyboardInterrupt: Ctrl-C; what was asked of the Hub by then may still arrive.
        ConfigError: An argument is out of range.
    """
    check_token(token)
    check_subfolder(subfolder)
    if create_pr and revision not in (None, "main"):
        raise ConfigError("create_pr=True opens a pull request against main: leave revision= out.")
    if not commit_message.strip():
        raise ConfigError("commit_message must say something; leave it out for the usual text.")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigError(f"timeout={timeout!r} must be a number of seconds above 0.")
    content = decode(config, weights).config
    options = CardOptions(license=license, datasets=_as_tuple(datasets), tags=_as_tuple(tags), base_model=base_model)
    api = HfApi(token=token, library_name="lpt_peft", library_version=__version__)

    def prepare() -> str:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not revision.startswith("refs/"):  # a pull request is there already
            api.create_branch(full_id, branch=revision, exist_ok=True)
        return full_id

    with hub_errors("Creating", repo_id, token):
        full_id = within(timeout, prepare, f"Creating {repo_id}")
    with hub_errors("Listing the files", full_id, token):
        info = within(timeout, lambda: api.model_info(full_id, revision=revision), f"Listing the files of {full_id}")
    prefix = f"{subfolder}/" if subfolder else ""
    files = {prefix + CONFIG_NAME: config, prefix + WEIGHTS_NAME: weights}
    if CARD_NAME not in {sibling.rfilename for sibling in info.siblings or ()}:
        files[CARD_NAME] = model_card(content, full_id, options, subfolder=subfolder, revision=revision).encode("utf-8")

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
        return within(timeout, commit, f"Committing to {full_id}")


def push_to_hub(
    adapter: LongTailPromptAdapter,
    repo_id: str,
    *,
    class_counts: Iterable[int] | None = None,
    label_names: Iterable[str] | None = None,
    training: Mapping[str, Any] | None = None,
    **options: Any,
) -> CommitInfo:
    """Push what an adapter learnt.

    Args:
        adapter: Its prompts, head and metadata travel, its backbone does not.
        repo_id: "owner/name", or "name" under the token's account.
        class_counts: As in `lpt_peft.checkpoint.save_prompts`; so are `label_names` and `training`.
        label_names: Name of each class.
        training: Free JSON; figures in `training["metrics"]` with `training["rule"]` get onto the card.
        **options: The other arguments of `push_files`.

    Raises:
        InputError, StateError: The adapter cannot be saved; nothing was sent.
        HubError: The Hub refused or could not be asked.
        ConfigError: An argument is out of range.
    """
    config, weights = encode(adapter, class_counts=class_counts, label_names=label_names, training=training)
    return push_files(config, weights, repo_id, **options)


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
