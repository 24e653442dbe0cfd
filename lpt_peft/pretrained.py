"""save_pretrained, from_pretrained, load_prompts and push_to_hub: an adapter's prompt files, on disk and on the Hub.

Not here: the format (`lpt_peft.checkpoint`) and the transfer (`lpt_peft.hub`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from torch import nn

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_Adapter = TypeVar("_Adapter", bound="PretrainedMixin")
Source = str | PathLike[str]


class PretrainedMixin(nn.Module):
    """The part of an adapter that reads and writes prompt files. A source is a folder, or "owner/name" on the Hub."""

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        is_main_process: bool = True,
        save_function: Callable[..., object] | None = None,
        class_counts: Iterable[int] | None = None,
        label_names: Iterable[str] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a prompt file: `config.json` and `prompts.safetensors`, about 4 MB for ViT-B.

        Class counts, label names and training default to what the adapter carries (`metadata`).

        Args:
            folder: Created if needed; nothing in it but the two files is touched.
            is_main_process: False gathers what is sharded, as all processes must, and writes nothing.
            save_function: Accepted because Accelerate's usual call passes it; not called, for the format is fixed.
            class_counts: Training images of each class, for shot metrics later.
            label_names: Name of each class.
            training: Free JSON up to 64 KiB: recipe, metrics with their shot rule, seeds.

        Raises:
            InputError: An argument does not fit the head or is not plain JSON; nothing was written.
            StateError: A parameter is not finite or of another dtype than floats; nothing was written.
            OSError: The disk is full, or the folder may not be written.
        """
        from lpt_peft.checkpoint import encode, save_prompts  # noqa: PLC0415 - a layer above

        adapter: Any = self
        if is_main_process:
            save_prompts(adapter, folder, class_counts=class_counts, label_names=label_names, training=training)
        else:
            encode(adapter, class_counts=class_counts, label_names=label_names, training=training)

    @classmethod
    def from_pretrained(
        cls: type[_Adapter],
        source: Source,
        vit: nn.Module | None = None,
        *,
        check_backbone: Literal["error", "warn", "off"] = "error",
        head_dropout: float = 0.1,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> _Adapter:
        """Wrap a ViT with the prompts of a folder or repository; an error leaves it as it was.

        Args:
            source: A folder if there is one of that name (a `Path` is always a folder), else "owner/name".
            vit: The same backbone as in training, not wrapped; None builds the one that the file names, pretrained.
            check_backbone: On another backbone or other weights: "error" refuses, "warn" warns, "off" does not check.
            head_dropout: Dropout before the head while training; not stored in the file.
            revision: Branch, tag or commit; for repositories only.
            subfolder: Where in the folder or repository.
            token: True or None for the token of the login, False for none, or the token itself.
            cache_dir: The Hub client's cache; None is its default.
            local_files_only: Take what the cache holds and do not ask the Hub.
            force_download: Download again what the cache holds.

        Raises:
            PromptFileError: The file is refused, or is for another backbone.
            HubError: The Hub did not give the prompts or the backbone.
            BackboneError: The ViT cannot take prompts, or is wrapped already.
            ConfigError: An argument is out of range, or there is no ViT and it cannot be built.
        """
        from lpt_peft.hub import from_pretrained  # noqa: PLC0415 - a layer above

        adapter: _Adapter = cast("Any", from_pretrained)(
            source,
            vit,
            check_backbone=check_backbone,
            head_dropout=head_dropout,
            kind=cls,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return adapter

    def load_prompts(
        self,
        source: Source,
        *,
        part: Literal["all", "shared"] = "all",
        check_backbone: Literal["error", "warn", "off"] = "error",
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Replace the adapter's prompts by those of another prompt file; the ViT is not touched.

        Args:
            source: As in `from_pretrained`; so are the arguments not named here.
            part: "all" replaces prompts, head, phase and metadata by new parameters, so make a new optimizer; "shared"
                copies the shared prompts and leaves the rest.
            check_backbone: As in `from_pretrained`.
            revision: Branch, tag or commit.
            subfolder: Where in the folder or repository.
            token: As in `from_pretrained`.
            cache_dir: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.
            force_download: As in `from_pretrained`.

        Raises:
            PromptFileError: The file is refused, or is for another backbone; nothing changed.
            HubError: The Hub did not give the prompts; nothing changed.
            ConfigError: An argument is out of range.
            StateError: The adapter was unwrapped.
        """
        from lpt_peft.hub import swap_from  # noqa: PLC0415 - a layer above

        adapter: Any = self
        swap_from(
            adapter,
            source,
            part=part,
            check_backbone=check_backbone,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        class_counts: Iterable[int] | None = None,
        label_names: Iterable[str] | None = None,
        training: Mapping[str, Any] | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
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
        """Push the prompts, and nothing of the backbone, to the Hub, with a model card if there is none.

        Args:
            repo_id: "owner/name", or "name" under the token's account; created if needed.
            class_counts: As in `save_pretrained`.
            label_names: As in `save_pretrained`.
            training: As in `save_pretrained`; `training["metrics"]` with `training["rule"]` get onto the card.
            revision: Branch, created if needed; None is "main".
            subfolder: For several prompt files in one repository.
            token: True or None for the token of the login, False for none, or the token itself.
            private: For a repository that is created; an existing one stays as it is.
            create_pr: Open a pull request instead of committing to the branch.
            commit_message: First line of the commit.
            commit_description: The rest of it.
            license: For the card, as the Hub names it.
            datasets: Hub ids of the training data, for the card.
            tags: More tags for the card.
            base_model: Hub id of the backbone, for the card.
            timeout: Seconds for each of the three steps (repository, listing, commit).

        Returns:
            The client's `CommitInfo`: `oid`, `commit_url`, `pr_url`.

        Raises:
            InputError: The adapter cannot be saved with these arguments; nothing was sent.
            StateError: A parameter is not finite; nothing was sent.
            HubError: The Hub refused or could not be asked.
            ConfigError: An argument is out of range.
        """
        from lpt_peft.hub import push_to_hub  # noqa: PLC0415 - a layer above

        adapter: Any = self
        return push_to_hub(
            adapter,
            repo_id,
            class_counts=class_counts,
            label_names=label_names,
            training=training,
            revision=revision,
            subfolder=subfolder,
            token=token,
            private=private,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            license=license,
            datasets=datasets,
            tags=tags,
            base_model=base_model,
            timeout=timeout,
        )
