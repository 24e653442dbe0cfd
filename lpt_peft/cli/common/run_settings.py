"""RunSettings: all that `lpt-peft train` is told, as flags and as `settings.json` of the output folder.

Not here: the backbone and the adapter that they describe (`build_run.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lpt_peft.errors import ConfigError
from lpt_peft.recipe.settings import TrainSettings, known

SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Sizes of what is learnt; see `LongTailPromptAdapter.wrap`."""

    prompt_length: int = 10
    """Tokens of a prompt in each block."""
    pool_size: int = 20
    """Groups."""
    top_k: int = 2
    """Groups chosen for an image."""
    shared_layers: int | None = None
    """Blocks with the shared prompt only; None: half of them."""
    head_dropout: float = 0.1
    logit_scale: float = 20.0


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Where the other parts are, and how images become tensors; see `lpt_peft.data`."""

    root: Path | None = None
    """Folder that the paths of a list start from; None: the list's own."""
    val: Path | None = None
    """List or folder of the validation part, where DATA does not hold one."""
    test: Path | None = None
    """List or folder of the test part, where DATA does not hold one."""
    validation_share: float = 0.0
    """Share of each class's training images to hold back for validation, where there is no such part."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the area that a training crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width over height of a training crop."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right mean something."""
    crop_pct: float | None = None
    """Of the evaluation: image size over the size that the shorter side is resized to; None: the backbone's."""
    unreadable: Literal["error", "skip"] = "error"
    """Stop at an image that cannot be read, or take another one of its class."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A whole run."""

    backbone: str
    """A model name of timm, such as vit_base_patch16_224.augreg_in21k; glyph_vit is the demo's own."""
    backbone_weights: Path | None = None
    """Its weights, a safetensors file; None: downloaded by timm, or random under --no-pretrained."""
    pretrained: bool = True
    img_size: int | None = None
    """Pixels of a side; None: the backbone's own."""
    start_from: str | None = None
    """A prompt file, folder or Hub repository, whose shared prompt the run begins with, and whose head if the classes
    are the same; with --shared.epochs 0 it trains phase "group" alone."""
    shot_rule: Literal["lift", "oltr", "lpt"] = "lpt"
    """Which counts are many, medium and few."""
    prompts: Annotated[PromptSettings, tyro.conf.arg(name="")] = field(default_factory=PromptSettings)
    images: Annotated[ImageSettings, tyro.conf.arg(name="")] = field(default_factory=ImageSettings)
    training: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    @classmethod
    def from_dict(cls, values: Any) -> RunSettings:
        """The inverse of `to_dict`; what is left out takes its default.

        Raises:
            ConfigError: A key is unknown or missing, or a value out of its range.
        """
        given = dict(known(cls, values))
        if "backbone" not in given:
            raise ConfigError("Settings of a run need a backbone; give --backbone NAME, or name it in the file.")
        images = dict(known(ImageSettings, given.get("images", {})))
        for name in ("scale", "ratio"):
            if name in images:
                images[name] = _pair(name, images[name])
        images |= {name: _path(images[name]) for name in ("root", "val", "test") if name in images}
        given["images"] = ImageSettings(**images)
        given["prompts"] = PromptSettings(**known(PromptSettings, given.get("prompts", {})))
        given["training"] = TrainSettings.from_dict(given.get("training", {}))
        given["backbone_weights"] = _path(given.get("backbone_weights"))
        return cls(**given)


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ConfigError: It cannot be read or is none.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The settings {file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The settings {file} must be one JSON object, as {SETTINGS} of an output folder.")
    return content


def _pair(name: str, value: Any) -> tuple[float, float]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(isinstance(one, (int, float)) for one in value)
    ):
        raise ConfigError(f"ImageSettings: {name}={value!r:.80} must be two numbers.")
    return value[0], value[1]


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)
