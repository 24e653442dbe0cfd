"""Output folders of `lpt-peft train`: where the trained weights are, and the backbone that they belong to.

Only the standard library is imported at the top, so that commands can check a path without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lpt_peft.errors import ConfigError, PromptFileNotFoundError, StateError

if TYPE_CHECKING:
    from torch import nn

SETTINGS, PROMPTS, MODEL = "settings.json", "prompts", "model"
"""In the output folder of a run: its settings, and its prompt file or model file."""
_WEIGHTS, _MODEL_WEIGHTS = "prompts.safetensors", "model.safetensors"
_MODEL_METHODS = ("linear_probe", "full")  # as in checkpoint.model_file, which imports torch

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


def prompt_folder(folder: Path) -> Path:
    """Return the folder of prompts.safetensors: RUN/prompts of a run, or that of the file itself.

    Another folder is returned unchanged.

    Raises:
        StateError: The run has not written its prompts yet, or was trained by a method without prompts.
    """
    if folder.name == _WEIGHTS and folder.is_file():
        return folder.parent
    prompts = folder / PROMPTS
    if (folder / SETTINGS).is_file() and not prompts.is_dir():
        if model_folder(folder) is not None:
            raise StateError(
                f"{folder} was trained by --method {_method(folder)}, which has no prompts, and this command needs a "
                "prompt file. Its weights are in model/."
            )
        raise StateError(
            f"{folder} holds no result yet: its training was interrupted. The same lpt-peft train command resumes it."
        )
    return prompts if prompts.is_dir() and not (folder / _WEIGHTS).exists() else folder


def model_folder(folder: Path) -> Path | None:
    """Return the folder of model.safetensors, if any: RUN/model of a run, or that of the file itself.

    A run in whose folder another method was trained before has a prompt file as well; its settings name the method.
    """
    if folder.name == _MODEL_WEIGHTS and folder.is_file():
        return folder.parent
    if (folder / _MODEL_WEIGHTS).is_file() and not (folder / _WEIGHTS).exists():
        return folder
    model = folder / MODEL
    if not (model / _MODEL_WEIGHTS).is_file():
        return None
    has_prompts = (folder / PROMPTS / _WEIGHTS).is_file()
    return None if has_prompts and _method(folder) not in _MODEL_METHODS else model


def _method(folder: Path) -> Any:
    """The method in the settings of a run; None if they cannot be read."""
    try:
        return loads((folder / SETTINGS).read_bytes(), SETTINGS, ConfigError).get("training", {}).get("method")
    except (OSError, ConfigError, AttributeError):
        return None


def existing_prompt_folder(folder: Path) -> Path:
    """Return the folder of an existing prompts.safetensors; see `prompt_folder`.

    Raises:
        PromptFileNotFoundError: There is none.
        StateError: The run has not written its prompts yet.
    """
    prompts = prompt_folder(folder)
    if (prompts / _WEIGHTS).is_file():
        return prompts
    problem = f"has no {_WEIGHTS}" if folder.is_dir() else "does not exist" if not folder.exists() else "is not a run"
    raise PromptFileNotFoundError(
        f"{folder} {problem}: give the output folder of lpt-peft train, or a folder with {_WEIGHTS} or "
        f"{_MODEL_WEIGHTS}."
    )
