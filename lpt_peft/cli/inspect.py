"""`lpt-peft inspect SOURCE`: what a prompt file holds, after all the checks of reading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tyro

from lpt_peft._text import printable
from lpt_peft.cli.common.options import Json


def inspect(
    source: tyro.conf.Positional[str],
    /,
    revision: str | None = None,
    subfolder: str | None = None,
    as_json: Json = False,
) -> None:
    """Check a prompt file and say what it holds; no backbone is needed.

    Args:
        source: A folder, or owner/name on the Hugging Face Hub.
        revision: Branch, tag or commit of the repository.
        subfolder: Where in the folder or repository.
        as_json: Print the content of config.json.
    """
    from lpt_peft.hub import read_prompts

    config = read_prompts(source, revision=revision, subfolder=subfolder).config
    print(json.dumps(config, indent=2) if as_json else _text(source, config))


def _text(source: str, config: Mapping[str, Any]) -> str:
    prompt, head, backbone = config["prompt"], config["head"], config["backbone"]
    preprocess, counts, names = config["preprocess"], config["class_counts"], head["label_names"]
    tensors = [
        f"  {name:16}{tensor['dtype']:5}{' x '.join(map(str, tensor['shape']))}"
        for name, tensor in config["tensors"].items()
    ]
    lines = [
        f"{source}: prompt file, format {config['format_version']}, written by lpt_peft {config['library_version']}",
        f"  prompts         phase {prompt['phase']}: {prompt['prompt_length']} tokens in each of {prompt['depth']} "
        f"blocks; {prompt['pool_size']} groups after block {prompt['shared_layers']}, {prompt['top_k']} for an image",
        f"  head            {head['num_classes']} classes, logit scale {head['logit_scale']:g}",
        f"  classes         {_some(names) if names else 'not named'}",
        f"  class counts    {_some(counts) if counts else 'not told'}",
        f"  backbone        {backbone['architecture']} ({backbone['library']} {backbone['library_version']}), tag "
        f"{backbone['pretrained_tag']}, {backbone['num_parameters']:,} parameters",
        f"  fingerprint     {backbone['fingerprint']}",
        f"  preprocess      {' x '.join(map(str, preprocess['input_size']))}, mean {preprocess['mean']}, "
        f"std {preprocess['std']}",
        *tensors,
        f"  training        {json.dumps(config['training'], ensure_ascii=False)}",
        "All checks passed: names, shapes, sizes, sha256, every value finite.",
    ]
    return "\n".join(printable(line, 100_000) for line in lines)


def _some(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return shown if len(values) <= 10 else f"{shown}, ... ({len(values)} in all)"
