"""RunSettings: the settings of `lpt-peft train`, as flags and as `settings.json` of the output folder.

Not here: the backbone and the adapter that they describe (`build_adapter.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lpt_peft._json import loads
from lpt_peft.cli.common.messages import without_errno
from lpt_peft.cli.common.paths import home_path
from lpt_peft.errors import ConfigError
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.settings_checks import known, refuse_invalid


# A help text is on one line of source: tyro keeps line breaks.
@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Sizes of the prompts; see `LongTailPromptAdapter.wrap`."""

    prompt_length: int = 10
    """Tokens of a prompt in each block."""
    pool_size: int = 20
    """Number of groups."""
    top_k: int = 2
    """Groups chosen for each image."""
    shared_layers: int | None = None
    """Blocks with the shared prompt only; None: half of them."""
    query: Literal["block_k", "final"] = "block_k"
    """How groups are selected: by the token that enters block K; or by the final feature, which needs a second pass."""
    head_dropout: float = 0.1
    """Dropout before the head."""
    logit_scale: float = 20.0
    """Scale of the cosine classifier."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Where the other splits are, and how images become tensors; see `lpt_peft.data`."""

    root: Path | None = None
    """Folder that the paths of a list start from; None: that of the list."""
    val: Path | None = None
    """List or folder of the validation split, if it is not in DATA."""
    test: Path | None = None
    """List or folder of the test split, if it is not in DATA."""
    validation_share: float = 0.0
    """Share of each class's training images to hold out for validation, if there is no validation split."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width over height) of a training crop."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right differ in meaning."""
    crop_pct: float | None = None
    """In evaluation, image size divided by the size that the shorter side is resized to; None: the backbone's."""
    unreadable: Literal["error", "skip"] = "error"
    """For an image that cannot be read: stop, or use another image of its class; in evaluation, leave it out."""
    exif: bool = True
    """Follow the EXIF orientation of photos."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels: red, green, blue, from 0 to 255."""

    def preprocess(self) -> dict[str, Any]:
        """Settings that a prompt file records, so that later predictions read images in the same way."""
        recorded = {"exif": self.exif, "background": list(self.background), "crop_pct": self.crop_pct}
        return {name: value for name, value in recorded.items() if value is not None}

    @classmethod
    def from_preprocess(cls, preprocess: Mapping[str, Any]) -> ImageSettings:
        """The settings that a prompt file records, and the defaults of the others."""
        recorded = {name: preprocess[name] for name in ("exif", "background", "crop_pct") if name in preprocess}
        if "background" in recorded:
            red, green, blue = recorded["background"]
            recorded["background"] = (red, green, blue)
        return cls(**recorded)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run."""

    backbone: str
    """A model of timm, such as vit_small_patch16_224, or LIBRARY/NAME, such as torchvision/vit_b_16; or glyph_vit."""
    backbone_weights: Path | None = None
    """Weights of the backbone, a safetensors file; None: downloaded, or random with --no-pretrained."""
    pretrained: bool = True
    """Download pretrained weights; --no-pretrained starts from random ones."""
    img_size: int | None = None
    """Side of an image in pixels; None: the backbone's."""
    start_from: str | None = None
    """A prompt file, in a folder or on the Hub: start from its shared prompt and the head rows of equal classes."""
    shot_rule: Literal["lift", "oltr", "lpt"] = "lpt"
    """Which training counts make a class many-, medium- or few-shot."""
    prompts: Annotated[PromptSettings, tyro.conf.arg(name="")] = field(default_factory=PromptSettings)
    images: Annotated[ImageSettings, tyro.conf.arg(name="")] = field(default_factory=ImageSettings)
    training: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)

    def check(self) -> None:
        """Refuse values that are out of range, before anything is loaded.

        Raises:
            ConfigError: A value is out of range; upper limits that depend on the backbone are not checked.
        """
        from lpt_peft.data.files.reading import Reading
        from lpt_peft.data.transforms import check_crops

        positive = "at least 1"
        prompts, images = self.prompts, self.images
        refuse_invalid(
            self,
            {
                "backbone": (bool(self.backbone), "a name, such as vit_base_patch16_224"),
                "img_size": (self.img_size is None or self.img_size >= 1, positive),
            },
        )
        refuse_invalid(
            prompts,
            {
                "prompt_length": (prompts.prompt_length >= 1, positive),
                "pool_size": (prompts.pool_size >= 1, positive),
                "top_k": (1 <= prompts.top_k <= prompts.pool_size, f"from 1 to pool_size={prompts.pool_size}"),
                "shared_layers": (
                    prompts.shared_layers is None or prompts.shared_layers >= (prompts.query == "block_k"),
                    'at least 1, or 0 with query="final"',
                ),
                "head_dropout": (0 <= prompts.head_dropout < 1, "at least 0 and below 1"),
                "logit_scale": (0 < prompts.logit_scale < float("inf"), "above 0 and finite"),
            },
        )
        one_pass = prompts.query == "block_k" or not self.training.query_regularizer
        refuse_invalid(self.training, {"query_regularizer": (one_pass, '0, or used with query="block_k"')})
        if self.start_from is not None:
            _check_starts(self.start_from, self.training)
        share = images.validation_share
        refuse_invalid(images, {"validation_share": (0 <= share < 1, "a share of at least 0 and below 1")})
        check_crops(images.scale, images.ratio, images.flip, images.crop_pct)
        Reading(images.exif, images.background)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    @classmethod
    def from_dict(cls, values: Any) -> RunSettings:
        """Invert `to_dict`; missing keys take their defaults.

        Raises:
            ConfigError: A key is unknown or missing, or a value is out of range.
        """
        given = dict(known(cls, values))
        if "backbone" not in given:
            raise ConfigError("The settings of a run need a backbone: give --backbone NAME, or name it in the file.")
        images = dict(known(ImageSettings, given.get("images", {})))
        for name, size in (("scale", 2), ("ratio", 2), ("background", 3)):
            if name in images:
                images[name] = _numbers(name, images[name], size)
        images |= {name: _path(images[name]) for name in ("root", "val", "test") if name in images}
        given["images"] = ImageSettings(**images)
        given["prompts"] = PromptSettings(**known(PromptSettings, given.get("prompts", {})))
        given["training"] = TrainSettings.from_dict(given.get("training", {}))
        if isinstance(given.get("start_from"), str):
            given["start_from"] = str(home_path(given["start_from"]))
        given["backbone_weights"] = _path(given.get("backbone_weights"))
        return cls(**given)


def _check_starts(start_from: str, training: TrainSettings) -> None:
    """Refuse a start that would replace loaded head rows; a loaded shared prompt is kept."""
    if training.init_head != "random":
        raise ConfigError(
            f'start_from={start_from!r} loads head rows, which init_head="{training.init_head}" would replace: give '
            'init_head="random", or leave start_from out.'
        )


def read_settings(file: Path) -> dict[str, Any]:
    """Read the JSON object of a file.

    Raises:
        ConfigError: The file cannot be read, or is not a JSON object.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The settings {file} cannot be read: {without_errno(str(error))}.") from error
    return loads(data, f"The settings file {file}", ConfigError)


def _numbers(name: str, value: Any, size: int) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != size or not all(type(v) in (int, float) for v in value):
        raise ConfigError(f"ImageSettings: {name}={value!r:.80} must be {size} numbers.")
    return tuple(value)


def _path(value: Any) -> Path | None:
    return None if value is None else home_path(value)
