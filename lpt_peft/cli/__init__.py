"""The `lpt-peft` command: one small file for each sub-command, imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

from lpt_peft.errors import LPTError, MissingExtraError, shown


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error that has a message, 2 for wrong arguments."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class names in a terminal of another encoding
    try:
        try:
            import rich  # noqa: F401, PLC0415 - an optional extra
            import tyro  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtraError(f'The lpt-peft command needs {error.name}: pip install "lpt_peft[cli]".') from error
        from lpt_peft.cli.convert import convert  # noqa: PLC0415 - after the check for tyro
        from lpt_peft.cli.demo import demo  # noqa: PLC0415
        from lpt_peft.cli.doctor import doctor  # noqa: PLC0415
        from lpt_peft.cli.inspect import inspect  # noqa: PLC0415
        from lpt_peft.cli.pull import pull  # noqa: PLC0415
        from lpt_peft.cli.push import push  # noqa: PLC0415
        from lpt_peft.cli.training import training_commands  # noqa: PLC0415

        commands: dict[str, Callable[..., Any]] = {
            "convert": convert,
            "demo": demo,
            "doctor": doctor,
            "inspect": inspect,
            "pull": pull,
            "push": push,
            **training_commands(sys.argv[1:] if arguments is None else arguments),
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="lpt-peft", args=arguments)
    except (LPTError, OSError) as error:  # of the disk: a full one, one that may not be written
        print(f"lpt-peft: {shown(error, 10_000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"lpt-peft: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0
