"""Names of the files in the output folder of `lpt-peft train`, and where its trained weights are.

Only the standard library is imported, so that commands can check a path without importing torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lpt_peft._json import loads
from lpt_peft.errors import ConfigError, PromptFileNotFoundError, StateError

SETTINGS, PROMPTS, MODEL = "settings.json", "prompts", "model"
"""In the output folder of a run: its settings, and its prompt file or model file."""
ModelMethod = Literal["linear_probe", "full"]
MODEL_METHODS: tuple[ModelMethod, ...] = ("linear_probe", "full")
"""Methods without prompts, which write a model file."""
_WEIGHTS, _MODEL_WEIGHTS = "prompts.safetensors", "model.safetensors"


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
    """Return the folder of model.safetensors, if the path has that file: RUN/model of a run, or the folder of a file.

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
    return None if has_prompts and _method(folder) not in MODEL_METHODS else model


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
