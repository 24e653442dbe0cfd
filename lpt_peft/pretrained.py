"""Saving and loading of prompt files, on disk and on the Hugging Face Hub: `PretrainedMixin`.

Not here: the format (`lpt_peft.checkpoint`), the transfer (`lpt_peft.hub`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from lpt_peft._prompt_content import content_of, mark_loaded, replace_prompts, warn_of, with_classes, wrap_content
from lpt_peft.backbones import Backbone
from lpt_peft.backbones.loading import build
from lpt_peft.backbones.weights import FrozenWeights
from lpt_peft.checkpoint import encode, write_prompt_file
from lpt_peft.checkpoint.files import expand_user
from lpt_peft.checkpoint.match import check_choice
from lpt_peft.checkpoint.relabel import LabelChanges
from lpt_peft.config import PromptMetadata
from lpt_peft.hub import check_subfolder, hub_errors, push, read_prompts
from lpt_peft.state import StateMixin

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_Adapter = TypeVar("_Adapter", bound="PretrainedMixin")
Source = str | PathLike[str]
Counts = Iterable[int] | Mapping[Any, int]
Labels = Iterable[str] | Mapping[Any, Any]


class PretrainedMixin(StateMixin):
    """The part of an adapter that reads and writes prompt files. A source is a folder, or "owner/name" on the Hub."""

    backbone: Backbone
    frozen_weights: FrozenWeights
    metadata: PromptMetadata
    preprocess: Callable[[], dict[str, Any]]
    unwrap: Callable[[], nn.Module]

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        subfolder: str | None = None,
        is_main_process: bool = True,
        save_function: Callable[..., object] | None = None,
        class_counts: Counts | None = None,
        label_names: Labels | None = None,
        training: Mapping[str, Any] | None = None,
        preprocess: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a prompt file: `prompts.safetensors`, about 4 MB for ViT-B, and `config.json` as its readable copy.

        Class counts, label names, training and preprocess default to what the adapter carries (`metadata`). Equal
        adapters give equal bytes, and files that already hold them are not touched.

        Args:
            folder: Created if missing, `~` is expanded; nothing in it but the two files is touched.
            subfolder: Folder inside `folder`, for prompts beside another library's model.
            is_main_process: False gathers sharded tensors, as all processes must, and writes nothing.
            save_function: Accepted because Accelerate's usual call passes it; not called, because the format is fixed.
            class_counts: Training images of each class, for shot metrics.
            label_names: Name of each class.
            training: Free JSON up to 64 KiB: recipe, metrics with their shot rule, seeds.
            preprocess: How images become tensors, where it differs from the backbone's own data configuration.

        Raises:
            InputError: An argument does not fit the head or is not plain JSON; nothing was written.
            StateError: A parameter is not finite, or not float32, float16 or bfloat16; nothing was written.
            PromptFileExistsError: The folder holds another library's `config.json`; nothing was written.
            ConfigError: The folder is a file, or cannot be created.
            OSError: The disk is full, or the folder is not writable.

        Example:
            >>> import tempfile, timm
            >>> from lpt_peft import LongTailPromptAdapter
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
            >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     adapter.save_pretrained(folder, label_names=["cat", "dog"])
            ...     vit = adapter.unwrap()
            ...     LongTailPromptAdapter.from_pretrained(folder, vit).metadata.label_names
            ('cat', 'dog')
        """
        check_subfolder(subfolder)
        folder = expand_user(folder) / (subfolder or "")
        content = content_of(
            self, class_counts=class_counts, label_names=label_names, training=training, preprocess=preprocess
        )
        if is_main_process:
            write_prompt_file(folder, content)
        else:
            encode(content)  # for the same errors

    @classmethod
    def from_pretrained(
        cls: type[_Adapter],
        source: Source,
        vit: nn.Module | None = None,
        *,
        label_names: Labels | None = None,
        num_classes: int | None = None,
        check_backbone: Literal["error", "warn", "off"] = "error",
        head_dropout: float = 0.1,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> _Adapter:
        """Wrap a ViT with the prompts of a folder or repository; after an error it is as before.

        The adapter is in eval mode, as models of PEFT and transformers are; call `train()` to continue training.

        Args:
            source: A folder if it exists (a `Path` is always a folder; `~` is expanded), else "owner/name".
            vit: The same backbone as in training, not wrapped; None builds the pretrained model that the file names.
            label_names: Names of the classes that the head is for; None keeps the file's classes. Trained rows of
                classes that the file knows by the same name are kept, other rows are new, and a warning lists the
                differences.
            num_classes: Expected number of classes; another number is an error.
            check_backbone: On another backbone or other weights: "error" refuses, "warn" warns, "off" does not check.
            head_dropout: Dropout before the head while training; not stored in the file.
            revision: Branch, tag or commit; for repositories only.
            subfolder: Folder inside the folder or repository.
            token: True or None for the token of the login, False for none, or the token itself.
            cache_dir: Cache of the Hub client; None is its default.
            local_files_only: Load from the cache without a request to the Hub.
            force_download: Download again what the cache holds.

        Raises:
            PromptFileError: The file is refused, or is for another backbone.
            HubError: The Hub did not deliver the prompts or the backbone.
            BackboneError: The ViT cannot take prompts, is already wrapped, or has no weights (meta device).
            InputError: `label_names` is invalid, or the file does not name its classes.
            ConfigError: An argument is out of range, or `vit` is None and the backbone cannot be built.
        """
        check_choice(check_backbone)
        content = read_prompts(
            source,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        content, changes = with_classes(content, label_names, num_classes)
        if vit is None:
            with hub_errors("Downloading the backbone", content.backbone.architecture, token):
                vit = build(asdict(content.backbone))
        adapter = wrap_content(cls, content, vit, check_backbone=check_backbone, head_dropout=head_dropout)
        mark_loaded(adapter, content, source)
        warn_of(changes)
        return adapter.eval()

    def load_prompts(
        self,
        source: Source,
        *,
        part: Literal["all", "shared"] = "all",
        label_names: Labels | None = None,
        check_backbone: Literal["error", "warn", "off"] = "error",
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> LabelChanges | None:
        """Replace the adapter's prompts by those of another prompt file; the ViT and the mode stay as they are.

        Args:
            source: As in `from_pretrained`.
            part: "all" replaces prompts, head, phase and metadata by new parameters, so make a new optimizer; a warning
                reports another number of classes. "shared" copies the shared prompts and leaves the rest.
            label_names: Names of the classes that the head is for; trained rows of classes that the file knows by the
                same name are kept, other rows are new, and a warning lists the differences. With "shared", these are
                the names of the adapter's own head, into which the trained rows are copied.
            check_backbone: As in `from_pretrained`.
            revision: As in `from_pretrained`.
            subfolder: As in `from_pretrained`.
            token: As in `from_pretrained`.
            cache_dir: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.
            force_download: As in `from_pretrained`.

        Returns:
            Classes whose rows are kept, new or dropped; None without `label_names`.

        Raises:
            PromptFileError, HubError: The file is refused, is for another backbone, or not delivered; nothing changed.
            InputError: `label_names` is invalid, or the file does not name its classes; nothing changed.
            ConfigError, StateError: An argument is out of range, or the adapter was unwrapped; nothing changed.
        """
        check_choice(check_backbone)
        content = read_prompts(
            source,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        before = self.prompt_config.num_classes
        changes = replace_prompts(self, content, part=part, label_names=label_names, check_backbone=check_backbone)
        mark_loaded(self, content, source, part)
        return warn_of(changes, before, self.prompt_config.num_classes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        class_counts: Counts | None = None,
        label_names: Labels | None = None,
        training: Mapping[str, Any] | None = None,
        preprocess: Mapping[str, Any] | None = None,
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
        pictures: Mapping[str, bytes] | None = None,
        timeout: float = 300.0,
    ) -> CommitInfo:
        """Push the prompts, without the backbone, to the Hub, with a model card if the repository has none.

        Args:
            repo_id: "owner/name", or "name" under the token's account; created if missing.
            class_counts: As in `save_pretrained`.
            label_names: As in `save_pretrained`.
            training: As in `save_pretrained`; the card shows `training["metrics"]` and `training["rule"]`.
            preprocess: As in `save_pretrained`.
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
            base_model: Hub id of the backbone, for the card.
            pictures: PNG files by name, such as "accuracy.png", which the card shows. A file of that name that was not
                pushed by this library stays, and a warning names it.
            timeout: Seconds for each step (repository, listing, commit).

        Returns:
            The client's `CommitInfo`: `oid`, `commit_url`, `pr_url`.

        Raises:
            InputError, StateError: The adapter cannot be saved with these arguments, or a picture is not a PNG file;
                nothing was sent.
            HubError: The Hub refused or could not be reached, or the repository holds another library's `config.json`.
            ConfigError: An argument is out of range.
        """
        content = content_of(
            self, class_counts=class_counts, label_names=label_names, training=training, preprocess=preprocess
        )
        return push(
            content,
            repo_id,
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
            pictures=pictures,
            timeout=timeout,
        )
