"""Write results of the apps: text for the terminal, tables as CSV or JSON, and checks before the work."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from modeling_amorlip.cli_amorlip import UserError


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TABLE_SUFFIXES = (".csv", ".json")
PROBE_SIZE = 2**20  # bytes: a disk with less free space counts as full


def printable(value: object) -> str:
    """Return text with control characters and undecodable bytes of file names escaped, to print on one line."""
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def escape_unencodable_output() -> None:
    """Let stdout and stderr print characters that their encoding lacks as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def check_writable(path: Path, option: str, suffixes: Sequence[str] = ()) -> None:
    """Raise `UserError` when a file cannot be written, before the work whose result it is to hold.

    Args:
        option: name of the command-line option that the path comes from.
        suffixes: the file suffixes to choose from, if the format depends on it.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {printable(path)}: name a file that ends in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UserError(f"{option} {printable(path)} is a folder; name a file.")
    if not path.parent.is_dir():
        raise UserError(f"{option} {printable(path)}: the folder {printable(path.parent)} does not exist.")
    try:
        if path.exists() and not path.is_file():
            return  # a pipe or a device cannot be tried without writing into it
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(PROBE_SIZE))
            probe.flush()
    except OSError as error:
        raise unwritable(path, option, error) from None


def unwritable(path: Path, option: str, error: Exception) -> UserError:
    """Return the error that tells the user why an output cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{option} {printable(path)} cannot be written: {reason}.")


def write_table(path: Path, option: str, rows: Sequence[DataclassInstance]) -> None:
    """Write one row per dataclass instance as CSV or JSON, depending on the suffix; raises `UserError` on failure.

    A file name that is not UTF-8 keeps its bytes in CSV, and is escaped in JSON as Python's `os.fsdecode` reads it.
    """
    write = _write_json if path.suffix.lower() == ".json" else _write_csv
    path = path.resolve()  # through a symbolic link, which replacing would destroy
    replace = path.is_file() or not path.exists()  # not a pipe or a device
    target = path.with_name(f".{path.name}.{os.getpid()}") if replace else path
    try:
        with target.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            write(file, rows)
        if replace:
            os.replace(target, path)  # only a complete file takes the place of an old one
    except OSError as error:
        if replace:
            target.unlink(missing_ok=True)
        raise unwritable(path, option, error) from None


def _write_csv(file: TextIO, rows: Sequence[DataclassInstance]) -> None:
    writer = csv.writer(file)
    writer.writerow([field.name for field in fields(rows[0])])
    writer.writerows(asdict(row).values() for row in rows)


def _write_json(file: TextIO, rows: Sequence[DataclassInstance]) -> None:
    json.dump([asdict(row) for row in rows], file, indent=1)
    file.write("\n")
