"""The sub-commands that need the extra `lpt_peft[train]`: there if it is, and otherwise said so when one is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lpt_peft.errors import MissingExtraError

NAMES = ("evaluate", "predict", "train")


def training_commands(arguments: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Name and function of each; `arguments` are those of the command line, after `lpt-peft`.

    Raises:
        MissingExtraError: One of them is called, and a library of the extra is not installed.
        ConfigError: The settings that `train` shall begin with cannot be used.
    """
    try:
        from lpt_peft.cli.evaluate import evaluate  # noqa: PLC0415 - an optional extra
        from lpt_peft.cli.predict import predict  # noqa: PLC0415
        from lpt_peft.cli.train import train_command  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if arguments and arguments[0] in NAMES:
            raise MissingExtraError(
                f'lpt-peft {arguments[0]} needs {error.name}: pip install "lpt_peft[train]".'
            ) from error
        return {}
    return {"evaluate": evaluate, "predict": predict, "train": train_command(arguments)}
