"""save_prompts and load_prompts: from an adapter to a folder, and from a folder onto a ViT.

Not here: the format (`schema.py`, `tensors.py`) and reading a file without a ViT (`prompt_file.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lpt_peft._text import printable
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones import Backbone, find_backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.backbones.loading import NORM_EPS
from lpt_peft.checkpoint.files import write_pair
from lpt_peft.checkpoint.prompt_file import PromptFile, encode, read_prompt_file
from lpt_peft.errors import BackboneMismatchError, ConfigError

CheckBackbone = Literal["error", "warn", "off"]


def save_prompts(
    adapter: LongTailPromptAdapter,
    folder: str | PathLike[str],
    *,
    class_counts: Iterable[int] | None = None,
    label_names: Iterable[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write what an adapter learnt: `config.json` and `prompts.safetensors`, about 4 MB for ViT-B.

    Equal adapters give equal bytes, and files that hold them already are not touched. One process writes at a time.
    The three options default to what the adapter carries (`adapter.metadata`), so a loaded one keeps them.

    Args:
        adapter: Its parameters are float32, float16 or bfloat16, and stay so in the file.
        folder: Made if need be; nothing in it but the two files is touched.
        class_counts: Training images of each class, for shot metrics later.
        label_names: Name of each class.
        training: Free JSON up to 64 KiB, never interpreted: recipe, metrics with their shot rule, seeds.

    Raises:
        InputError: An option does not fit the head or is not plain JSON; nothing was written.
        StateError: A parameter is not finite or of another dtype; nothing was written.
        OSError: The disk is full, or the folder may not be written.

    Example:
        >>> import tempfile, timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> adapter = LongTailPromptAdapter.wrap(vit, num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_prompts(adapter, folder, label_names=["cat", "dog"])
        ...     vit = adapter.unwrap()
        ...     load_prompts(folder, vit).metadata.label_names
        ('cat', 'dog')
    """
    config, weights = encode(adapter, class_counts=class_counts, label_names=label_names, training=training)
    write_pair(Path(folder), config, weights)


def load_prompts(
    folder: str | PathLike[str],
    vit: nn.Module,
    *,
    check_backbone: CheckBackbone = "error",
    head_dropout: float = 0.1,
) -> LongTailPromptAdapter:
    """Wrap a ViT with the prompts of a folder. Where anything is wrong, the ViT stays as it was.

    Args:
        folder: With `config.json` and `prompts.safetensors`; nothing else in it is opened.
        vit: The very backbone the prompts were learnt on, not wrapped.
        check_backbone: On another backbone or other weights: "error" refuses, "warn" warns, "off" does not look.
            The sizes must fit in any case.
        head_dropout: Dropout before the head, while training; not stored in the file.

    Returns:
        The adapter in the file's phase and dtypes, on the ViT's device, in the ViT's train/eval mode; its `metadata`
        is the file's, so that saving it again gives the same bytes.

    Raises:
        PromptFileError: The file is refused; the class tells why, as in `decode`.
        BackboneMismatchError: The prompts were learnt on another backbone.
        BackboneError: The ViT cannot take prompts, or is wrapped already.
        ConfigError: An option is out of range, or its sizes do not fit.
    """
    check_choice(check_backbone)
    return wrap_prompts(read_prompt_file(folder), vit, check_backbone=check_backbone, head_dropout=head_dropout)


def wrap_prompts(
    prompts: PromptFile,
    vit: nn.Module,
    *,
    check_backbone: CheckBackbone = "error",
    head_dropout: float = 0.1,
    kind: type[LongTailPromptAdapter] = LongTailPromptAdapter,
) -> LongTailPromptAdapter:
    """Wrap a ViT with prompts that were read already, in an adapter of class `kind`; the rest as in `load_prompts`."""
    backbone = find_backbone(vit)
    check_match(prompts, backbone, check_backbone)
    # The constructor draws initial prompts; loading must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        adapter = kind(backbone, prompts.prompt_config, head_dropout=head_dropout)
    try:
        for name, tensor in prompts.tensors.items():
            parameter = adapter.get_parameter(name)
            parameter.data = parameter.data.to(tensor.dtype)
        adapter.load_adapter_state_dict(prompts.tensors)
    except BaseException:
        adapter.unwrap()
        raise
    adapter.phase = prompts.phase
    adapter.metadata = prompts.metadata
    return adapter


def check_choice(check_backbone: str) -> None:
    """`check_backbone` is one of the three words.

    Raises:
        ConfigError: It is not.
    """
    if check_backbone not in ("error", "warn", "off"):
        raise ConfigError(f'check_backbone={check_backbone!r} must be "error", "warn" or "off".')


def check_match(
    prompts: PromptFile, backbone: Backbone, check_backbone: CheckBackbone, known: str | None = None
) -> None:
    """Compare the backbone with the one the prompts were learnt on; `known` is its fingerprint, if computed before.

    Raises:
        BackboneMismatchError: It is another one, and `check_backbone` is "error".
        ConfigError: `check_backbone` is unknown.
    """
    check_choice(check_backbone)
    if check_backbone != "off" and (mismatch := _mismatch(prompts.config["backbone"], backbone, known)):
        if check_backbone == "error":
            raise BackboneMismatchError(f'{mismatch} To load them all the same: check_backbone="warn".')
        warnings.warn(mismatch, stacklevel=3)


def _mismatch(theirs: Mapping[str, Any], backbone: Backbone, known: str | None) -> str | None:
    """How the backbone differs from the file's, or None; the backbone is only read."""
    ours = {**asdict(backbone.info()), "fingerprint": known or fingerprint(backbone.frozen_tensors())}
    eps = theirs["model_args"].get(NORM_EPS)
    other_eps = {m.eps for m in backbone.model.modules() if isinstance(m, nn.LayerNorm)} - {eps}
    if eps is not None and other_eps:
        return (
            f"These prompts were trained on {printable(theirs['architecture'], 80)} whose LayerNorms have eps={eps:g}; "
            f"the ViT given has {max(other_eps):g}. Build it with norm_layer=partial(torch.nn.LayerNorm, eps={eps:g})."
        )
    # The same weights can be cut into another number of heads: the fingerprint does not tell.
    if all(ours[key] == theirs[key] for key in ("fingerprint", "num_heads")):
        return None
    if all(ours[key] == theirs[key] for key in ("architecture", "embed_dim", "depth", "num_heads")):
        cause = "the same architecture, other weights: was pretrained=True forgotten, or another tag meant?"
        dtype = next(backbone.model.parameters()).dtype
        if dtype != torch.float32:
            cause += f" Or was the model cast, to {dtype}, after the prompts were learnt?"
    else:
        cause = f"another architecture; build {printable(theirs['architecture'], 80)} with the sizes named here."
    return (
        f"These prompts were learnt on {_describe(theirs)}; the ViT given is {_describe(ours)}. Likely cause: {cause}"
    )


def _describe(backbone: Mapping[str, Any]) -> str:
    return (
        "{architecture} (tag {pretrained_tag}, width {embed_dim}, {depth} blocks, {num_heads} heads, "
        "fingerprint {fingerprint:.12}...)"
    ).format_map({key: printable(value, 80) for key, value in backbone.items()})
