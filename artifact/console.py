"""What the commands share: an error becomes one line and an exit code, and SIGTERM ends like Ctrl-C."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .errors import PloraError

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130
CLICK_CONTEXT: dict[str, Any] = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
"""Context settings of every command."""


def reports_errors(function: Command) -> Command:
    """A PloraError becomes `error: …` on standard error and its own exit code; Ctrl-C and SIGTERM become 130."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, interrupt)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes lines of its own, where we say what a person can act on
        try:
            return function(*args, **kwargs)
        except PloraError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader is gone: nothing to say, nobody to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return wrapper  # type: ignore[return-value]


def interrupt(number: int, frame: Any) -> NoReturn:
    """What SIGTERM does in a command: the same as Ctrl-C."""
    raise KeyboardInterrupt
