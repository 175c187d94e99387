"""What every command line of the repository shares: the error that is a user's to fix, and how a command ends."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import select
import sys
from collections.abc import Callable, Iterator


INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells report it


class UserError(Exception):
    """An error that the user can fix. Its message says what is wrong and what to do, and is all that is printed."""


@contextlib.contextmanager
def as_user_error(*errors: type[Exception]) -> Iterator[None]:
    """Turn the given exceptions, whose messages are meant for users, into a `UserError`."""
    try:
        yield
    except errors as error:
        raise UserError(str(error)) from error


def cli_entry_point(main: Callable[[], int | None]) -> Callable[[], int]:
    """Make a `main` return its exit status, whatever ends it.

    A `UserError` prints its message on stderr and gives 1. Ctrl-C gives 130 and a reader that has gone away (`| head`)
    141, both without a word. Characters that stdout or stderr cannot encode are escaped instead of raising.
    """

    @functools.wraps(main)
    def run() -> int:
        _escape_unencodable_output()
        try:
            status = main() or 0
            sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            if not _stdout_is_closed():
                raise
            return BROKEN_PIPE
        return status

    return run


def _escape_unencodable_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stdout_is_closed() -> bool:
    """Return whether nobody reads stdout any more; if so, discard what it still buffers."""
    try:
        descriptor = sys.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, 0)
        is_closed = any(event & select.POLLERR for _, event in poller.poll(0))
    except (AttributeError, io.UnsupportedOperation):  # Windows, or a stdout that is no file
        return False
    if is_closed:
        # The interpreter flushes stdout once more at exit, which would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return is_closed
