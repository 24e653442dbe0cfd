"""The backbone in the settings of a run.

Only the standard library is imported at the top, so that commands can check a path without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lpt_peft._json import (
    BrokenRule,
    Rule,
    boolean,
    integer,
    loads,
    nullable,
    object_of,
    one_of,
    text,
)
from lpt_peft._run_folder import SETTINGS
from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

_RULES: dict[str, Rule] = {
    "backbone": text,
    "pretrained": boolean,
    "img_size": nullable(integer(1)),
    "backbone_weights": nullable(text),
}
_TRAINING: dict[str, Rule] = {"seed": integer(0), "backbone_dtype": one_of("float32", "bfloat16", "float16")}


@dataclass(frozen=True, kw_only=True)
class RunBackbone:
    """The ViT of a run.

    Args:
        backbone: Name for `lpt_peft.backbones.loading.build_backbone`.
        pretrained: Whether it has pretrained weights.
        img_size: Side of an image in pixels; None: that of the model.
        backbone_weights: Safetensors file of the weights; None: those of the library.
        seed: Seed of the run, from which random weights are drawn.
        backbone_dtype: dtype to which the run cast the weights, such as "bfloat16".
    """

    backbone: str
    pretrained: bool = True
    img_size: int | None = None
    backbone_weights: str | None = None
    seed: int = 0
    backbone_dtype: str = "float32"

    def build(self) -> nn.Module:
        """Build the ViT in eval mode, in float32; random weights are the same for the same seed.

        Raises:
            BackboneError: No installed library has such a model, or its weights are not available.
            ConfigError: The model does not take these settings.
            MissingExtraError: Its library is not installed.
        """
        from lpt_peft._random import seeded  # noqa: PLC0415 - imports torch
        from lpt_peft.backbones.loading import build_backbone  # noqa: PLC0415

        with seeded(self.seed):
            return build_backbone(
                self.backbone, pretrained=self.pretrained, img_size=self.img_size, weights_file=self.backbone_weights
            )


def read_run_backbone(folder: Path) -> RunBackbone | None:
    """Read the backbone in the settings of a run; None if the folder has no settings.

    Args:
        folder: Output folder of the run.

    Raises:
        ConfigError: The settings cannot be read, or do not describe a backbone.
    """
    file = folder / SETTINGS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"The settings {file} cannot be read: {error.strerror}.") from error
    values = loads(data, f"The settings file {file}", ConfigError)
    found = {name: value for name, value in values.items() if name in _RULES}
    training = values.get("training", {})
    if isinstance(training, dict):
        training = {name: value for name, value in training.items() if name in _TRAINING}
    try:
        object_of({"backbone": text}, _RULES)(found, "")
        object_of({}, _TRAINING)(training, "training")
    except BrokenRule as error:
        raise ConfigError(f"{file} does not describe a run: {error}. Copy the folder again.") from error
    return RunBackbone(**found, **training)
