"""The `lpt-peft` command, one file per sub-command; `common/` holds what they share.

These files import only what their arguments need at the top. torch and every library that imports it are imported
inside the functions, so that `lpt-peft --help` and `lpt-peft SUBCOMMAND --help` answer without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

from lpt_peft._version import __version__
from lpt_peft.cli.common.exit_codes import FAILED, INTERRUPTED, OK, USAGE
from lpt_peft.cli.common.flags import name_flags
from lpt_peft.cli.common.messages import plain_warnings, print_message, text_of_error, tidy
from lpt_peft.cli.common.paths import expand_home
from lpt_peft.cli.common.streams import flush_output, quiet_broken_pipe, replace_unprintable, wrapped_help
from lpt_peft.errors import LPTError, MissingExtraError

_DESCRIPTION = (
    "Long-tailed Prompt Tuning for frozen Vision Transformers. lpt-peft --version prints the version. Exit status: "
    "0 success; 1 an error, explained on standard error; 2 wrong arguments; 3 finished, but some images were left out "
    "or need attention; 130 interrupted."
)
_RESUMABLE = ("compare", "demo", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `lpt-peft`; None takes those of the process.

    Returns:
        The exit status; see `lpt_peft.cli.common.exit_codes`.
    """
    replace_unprintable(sys.stdout, sys.stderr)
    with quiet_broken_pipe(), plain_warnings():
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            try:
                return _run(expand_home(words))
            finally:
                flush_output()
        except LPTError as error:
            return _fail(name_flags(str(error), words) if words[:1] in (["train"], ["compare"], ["analyse"]) else error)
        except BrokenPipeError:
            raise
        except OSError as error:
            return _fail(text_of_error(error))
        except KeyboardInterrupt as stop:
            hint = " The same command resumes from the last checkpoint." if words[:1] and words[0] in _RESUMABLE else ""
            print_message(f"{tidy(stop) or 'interrupted'}.{hint}")
            return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    if list(words) == ["--version"]:
        print(f"lpt-peft {__version__}")
        return OK
    try:
        import rich  # noqa: F401 - an optional extra
        import tyro
    except ImportError as error:
        raise MissingExtraError(f'The lpt-peft command needs {error.name}: pip install "lpt_peft[cli]".') from error
    from lpt_peft.cli.common.parsing import parse

    commands = _commands(words)
    if words and words[0] not in commands and not words[0].startswith("-"):
        near = get_close_matches(words[0], commands, 1, 0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        _fail(f'There is no sub-command "{words[0]}".{meant} There are {", ".join(commands)}: lpt-peft --help.')
        return USAGE
    with wrapped_help() if {"-h", "--help"} & set(words) else nullcontext():
        if not words or words[0] not in commands:
            tyro.extras.subcommand_cli_from_dict(commands, prog="lpt-peft", description=_DESCRIPTION, args=words)
            return OK  # the help was printed
        call, problems = parse(words[0], commands[words[0]], words[1:])
    for problem in problems:
        _fail(problem)
    if problems:
        return USAGE
    status = call()
    return OK if status is None else int(status)


def _fail(message: object) -> int:
    print_message(message)
    return FAILED


def _commands(words: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Name and function of each sub-command; needs tyro.

    Raises:
        ConfigError: The --preset or --config of `train`, or the --rows of `compare`, cannot be used.
    """
    from lpt_peft.cli.analyse import analyse
    from lpt_peft.cli.check import check
    from lpt_peft.cli.compare import compare_command
    from lpt_peft.cli.convert import convert
    from lpt_peft.cli.demo import demo
    from lpt_peft.cli.doctor import doctor
    from lpt_peft.cli.evaluate import evaluate
    from lpt_peft.cli.export import export
    from lpt_peft.cli.inspect import inspect
    from lpt_peft.cli.predict import predict
    from lpt_peft.cli.pull import pull
    from lpt_peft.cli.push import push
    from lpt_peft.cli.report import report
    from lpt_peft.cli.train import train_command

    return {
        "analyse": analyse,
        "check": check,
        "compare": compare_command(words),
        "convert": convert,
        "demo": demo,
        "doctor": doctor,
        "evaluate": evaluate,
        "export": export,
        "inspect": inspect,
        "predict": predict,
        "pull": pull,
        "push": push,
        "report": report,
        "train": train_command(words),
    }
