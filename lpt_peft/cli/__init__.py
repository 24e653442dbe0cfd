"""The `lpt-peft` command, one file for each sub-command.

At their top, these files import only what their arguments need. torch and everything that imports it is imported
inside the functions: `lpt-peft --help` and `lpt-peft SUBCOMMAND --help` answer without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any

from lpt_peft._text import printable
from lpt_peft._version import __version__
from lpt_peft.errors import LPTError, MissingExtraError

_DESCRIPTION = "Long-tailed Prompt Tuning for frozen Vision Transformers. lpt-peft --version prints the version."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error that has a message, 2 for wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class names in a terminal of another encoding
    if list(arguments) == ["--version"]:
        print(f"lpt-peft {__version__}")
        return 0
    try:
        try:
            import rich  # noqa: F401 - an optional extra
            import tyro
        except ImportError as error:
            raise MissingExtraError(f'The lpt-peft command needs {error.name}: pip install "lpt_peft[cli]".') from error
        tyro.extras.subcommand_cli_from_dict(
            _commands(arguments), prog="lpt-peft", description=_DESCRIPTION, args=arguments
        )
    except (LPTError, OSError) as error:  # of the disk: a full one, one that may not be written
        print(f"lpt-peft: {printable(error, 10_000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"lpt-peft: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _commands(arguments: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Name and function of each sub-command; needs tyro.

    Raises:
        ConfigError: The --preset or --config that `train` starts from cannot be used.
    """
    from lpt_peft.cli.convert import convert
    from lpt_peft.cli.demo import demo
    from lpt_peft.cli.doctor import doctor
    from lpt_peft.cli.evaluate import evaluate
    from lpt_peft.cli.inspect import inspect
    from lpt_peft.cli.predict import predict
    from lpt_peft.cli.pull import pull
    from lpt_peft.cli.push import push
    from lpt_peft.cli.train import train_command

    return {
        "convert": convert,
        "demo": demo,
        "doctor": doctor,
        "evaluate": evaluate,
        "inspect": inspect,
        "predict": predict,
        "pull": pull,
        "push": push,
        "train": train_command(arguments),
    }
