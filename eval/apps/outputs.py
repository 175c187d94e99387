"""Write results of the apps: text for the terminal, tables as CSV or JSON, and checks before the work."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from modeling_amorlip.cli_amorlip import UserError


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TABLE_SUFFIXES = (".csv", ".json")
ESCAPED_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph separators
PROBE_SIZE = 2**20  # bytes: a disk with less free space counts as full


def printable(value: object) -> str:
    """Return text on one line, with control characters and the undecodable bytes of file names escaped."""
    return "".join(_escape(c) if unicodedata.category(c) in ESCAPED_CATEGORIES else c for c in str(value))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def user_path(name: str) -> Path:
    """Return the path of a command-line argument; `~` stands for the home folder even where the shell keeps it."""
    if not name:
        raise argparse.ArgumentTypeError("the path is empty")  # `Path` would take it for the current folder
    return Path(os.path.expanduser(name))


def check_writable(path: Path, option: str, suffixes: Sequence[str] = ()) -> None:
    """Raise `UserError` when a file cannot be written, before the work whose result it is to hold.

    Args:
        option: name of the command-line option that the path comes from.
        suffixes: the file suffixes to choose from, if the format depends on it.
    """
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    if suffixes and not is_special and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {printable(path)}: name a file that ends in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UserError(f"{option} {printable(path)} is a folder; name a file.")
    if not path.parent.is_dir():
        raise UserError(f"{option} {printable(path)}: the folder {printable(path.parent)} does not exist.")
    try:
        if is_special:
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
    return UserError(f"{option} {printable(path)} cannot be written: {reason}; name another place.")


def write_table(path: Path, option: str, rows: Sequence[DataclassInstance]) -> None:
    """Write one row per dataclass instance as CSV or JSON, depending on the suffix; raises `UserError` on failure.

    A file name that is not UTF-8 keeps its bytes in CSV, and is escaped in JSON as Python's `os.fsdecode` reads it.
    """
    write = _write_json if path.suffix.lower() == ".json" else _write_csv
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                write(file, rows)
            return
        with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            write(file, rows)
    except OSError as error:
        raise unwritable(path, option, error) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which takes the place of `path` only when it is complete."""
    path = path.resolve()  # a symbolic link stays one
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_csv(file: TextIO, rows: Sequence[DataclassInstance]) -> None:
    writer = csv.writer(file)
    writer.writerow([field.name for field in fields(rows[0])])
    writer.writerows(asdict(row).values() for row in rows)


def _write_json(file: TextIO, rows: Sequence[DataclassInstance]) -> None:
    json.dump([asdict(row) for row in rows], file, indent=1)
    file.write("\n")
