"""An error that a user can mend ends a command with one line on stderr and exit code 2; --debug shows its traceback."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from common.exits import KEYBOARD, READER_GONE, USER_ERROR
from common.interrupts import raise_on_ctrl_c
from common.redaction import redact

LESS_MEMORY = (
    "what a command has of --row_tokens, --batch_tokens, --chunk_tokens makes it need less where it is smaller"
)


class UsageError(ValueError):
    """What the user asked for cannot be done; the message names the value, what was expected and what to do."""


@dataclass
class SetupPhase:
    """Open until the work proper begins: until then a ValueError or OSError means that what was asked for cannot be
    done, afterwards that something has crashed."""

    open: bool = True

    def close(self) -> None:
        self.open = False


def error_line(error: BaseException) -> str:
    """The message of an exception in one line, its secrets hidden."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        message = str(error) or type(error).__name__
    return redact(" ".join(filter(None, map(str.strip, message.splitlines()))))


def out_of_memory(error: BaseException) -> str:
    """What torch says in one line where a device's memory does not suffice; empty for other errors."""
    torch = sys.modules.get("torch")  # commands without it need not wait for it
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return ""
    return error_line(error).split(" Of the allocated memory ")[0].removesuffix(".")


@contextmanager
def user_errors(*more: type[Exception], stopped: str = "stopped by Ctrl-C") -> Iterator[SetupPhase]:
    """Around the whole of a command: a ValueError, an OSError, an error in its arguments, a device without memory or
    one of `more` ends it with one "error:" line and USER_ERROR, Ctrl-C with the line `stopped` and KEYBOARD.

    With --debug, or once the phase is closed, errors are raised as they are.
    """
    phase = SetupPhase()
    try:
        raise_on_ctrl_c()
        yield phase
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(KEYBOARD)
    except BrokenPipeError:  # the reader of our output has gone, as head does: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except Exception as error:
        memory = out_of_memory(error)
        if not isinstance(error, (ValueError, OSError, ArgumentError, *more)) and not memory:
            raise
        if "--debug" in sys.argv or not phase.open:
            raise
        print("error:", f"{memory}; {LESS_MEMORY}" if memory else error_line(error), file=sys.stderr)
        sys.exit(USER_ERROR)


def without_debug(arguments: Sequence[str]) -> list[str]:
    """What a command's parser gets: --debug is for `user_errors`. What stands behind -- is for another command."""
    own = arguments.index("--") if "--" in arguments else len(arguments)
    return [argument for argument in arguments[:own] if argument != "--debug"] + list(arguments[own:])


def run_command(
    work: Callable[[list[str]], Iterable[str]],
    arguments: Sequence[str] | None,
    *more: type[Exception],
    stopped: str = "stopped by Ctrl-C",
) -> int:
    """Prints the lines of work(arguments), by default those of the command line, under `user_errors`, whose line
    `stopped` says what becomes of work that Ctrl-C ends. Returns the exit code."""
    try:
        with user_errors(*more, stopped=stopped):
            for line in work(without_debug(sys.argv[1:] if arguments is None else arguments)):
                print(line)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
