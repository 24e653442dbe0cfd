"""`lpt-peft inspect SOURCE`: check a prompt file or model file and print its contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lpt_peft._text import printable
from lpt_peft.cli.common.options import Json

if TYPE_CHECKING:
    from lpt_peft.checkpoint import PromptContent
    from lpt_peft.checkpoint.model_file import ModelContent


def inspect(
    source: tyro.conf.Positional[str],
    /,
    revision: str | None = None,
    subfolder: str | None = None,
    as_json: Json = False,
) -> None:
    """Check a prompt file or model file and print its contents; no backbone is needed.

    Args:
        source: A prompt file, a model file or the output folder of a run, or owner/name on the Hugging Face Hub.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the folder or repository.
        as_json: Print the configuration in the header of prompts.safetensors, or config.json of a model file.
    """
    from lpt_peft._run_folder import model_folder
    from lpt_peft.checkpoint import encode
    from lpt_peft.checkpoint.files import compare_copy
    from lpt_peft.cli.common.streams import print_json, print_text

    if (model := model_folder(Path(source, subfolder or ""))) is not None:
        _inspect_model(source, model, as_json)
        return
    content, copy = _read(source, revision, subfolder)
    config = encode(content).config
    if as_json:
        print_json(config)
        return
    print_text(describe(source, content))
    if (difference := compare_copy(copy, config)) is not None:
        print_text(printable(f"config.json {difference}; it is only a copy, and prompts.safetensors is what loads."))


def _inspect_model(source: str, folder: Path, as_json: bool) -> None:
    from lpt_peft.checkpoint.model_file import read_model_config, read_model_file
    from lpt_peft.cli.common.streams import print_json, print_text

    content = read_model_file(folder)  # also with --json, since it checks the weights
    if as_json:
        print_json(read_model_config(folder))
        return
    parameters = content.head.numel() + sum(tensor.numel() for tensor in content.vit.values())
    lines = [
        f"{source}: model file, method {content.method}, written by lpt_peft {content.library_version}",
        *_description(content, len(content.head), content.logit_scale),
        f"  weights         {len(content.vit)} tensors of the ViT and the head, {parameters:,} values",
        *_training(content.metadata.training),
        "All checks passed: names, sizes, sha256, every value finite.",
    ]
    print_text("\n".join(printable(line, 100_000) for line in lines))


def _read(source: str, revision: str | None, subfolder: str | None) -> tuple[PromptContent, bytes | None]:
    """The content, and the bytes of config.json beside it."""
    from lpt_peft._run_folder import prompt_folder
    from lpt_peft.checkpoint import decode
    from lpt_peft.checkpoint.files import read_copy
    from lpt_peft.hub import HubLocation, check_subfolder, folder_named, is_repository, pull, pull_copy, read_prompts

    if not is_repository(source):
        check_subfolder(subfolder)
        folder = prompt_folder(Path(source, subfolder or ""))
        return read_prompts(folder, revision=revision), read_copy(folder)
    with folder_named(source):
        pulled = pull(HubLocation(repo_id=source, revision=revision, subfolder=subfolder))
    return decode(pulled.weights), pull_copy(HubLocation(repo_id=source, revision=pulled.commit, subfolder=subfolder))


def describe(source: str, content: PromptContent) -> str:
    """Several lines of text about a prompt file."""
    config = content.config
    tensors = [
        f"  {name:16}{str(tensor.dtype).removeprefix('torch.'):9}{' x '.join(map(str, tensor.shape))}"
        for name, tensor in sorted(content.tensors.items())
    ]
    lines = [
        f"{source}: prompt file, format 2, written by lpt_peft {content.library_version}",
        f"  prompts         phase {content.phase}: {config.layout}",
        *([] if content.router is None else [f"  router          {content.router.describe()}"]),
        *_description(content, config.num_classes, config.logit_scale),
        *tensors,
        *_training(content.metadata.training),
        "All checks passed: names, shapes, sizes, sha256, every value finite.",
    ]
    return "\n".join(printable(line, 100_000) for line in lines)


def _description(content: PromptContent | ModelContent, num_classes: int, logit_scale: float) -> list[str]:
    """Lines about what prompt files and model files share."""
    metadata, backbone = content.metadata, content.backbone
    return [
        f"  head            {num_classes} classes, logit scale {logit_scale:g}, temperature "
        f"{_or_unknown(metadata.temperature)}",
        f"  classes         {_first(metadata.label_names)}",
        f"  class counts    {_first(metadata.class_counts)}",
        f"  backbone        {backbone.architecture} ({backbone.library} {backbone.library_version}), tag "
        f"{backbone.pretrained_tag}, {backbone.num_parameters:,} parameters, dtype "
        f"{_or_unknown(metadata.backbone_dtype)}",
        f"  fingerprint     {content.fingerprint}",
        f"  preprocess      {', '.join(f'{name} {value}' for name, value in sorted(content.preprocess.items()))}",
    ]


def _training(values: Mapping[str, Any] | None) -> list[str]:
    """A line for each entry, and for each entry of its mappings."""
    lines = []
    for name, value in (values or {}).items():
        nested = value if isinstance(value, Mapping) and value else {"": value}
        for key, entry in nested.items():
            lines.append(f"  training        {name}{key and '.'}{key} {json.dumps(entry, ensure_ascii=False)}")
    return lines or ["  training        unknown"]


def _or_unknown(value: object) -> object:
    return "unknown" if value is None else value


def _first(values: tuple[Any, ...] | None) -> str:
    if not values:
        return "unknown"
    first = ", ".join(map(str, values[:10]))
    return first if len(values) <= 10 else f"{first}, ... ({len(values)} in all)"
