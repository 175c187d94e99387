"""The one exception that means a user's mistake rather than a bug, and how command lines end with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can put right; the message says what and how, and is all that is printed."""


def cli_entry_point(main: Callable[[], int | None]) -> Callable[[], int]:
    """The `main` of a command line, whose exit status a `UserError` makes 1, with its message on stderr."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run
