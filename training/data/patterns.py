"""Expand the patterns of `train_data` into file names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from modeling_amorlip.cli_amorlip import UserError
from training.data.tar_pairs import IMAGE_EXTENSIONS


MAX_NAMES = 1_000_000
GLOB_CHARACTERS = re.compile(r"[*?\[]")
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)
TABLE_EXTENSIONS = ("parquet", "csv", "tsv", "json", "jsonl", "arrow")


def expand(source: str) -> list[str]:
    """Return the local files that a source names.

    `{000..123}`, `{00..10..2}`, `{a..f}` and `{a,b}` are expanded as in a shell; `*`, `**`, `?` and `[...]` are
    matched; `~` is the home folder. A folder that holds tars, at any depth, stands for them. Any other name is returned
    as it is.

    Raises:
        UserError: a pattern, or a name that it expands to, matches no file.
    """
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        return _list_folder(source)
    if os.path.exists(source):
        return [source]
    names = expand_braces(source)
    files = [file for name in names for file in _match(name)]
    if names != [source] or GLOB_CHARACTERS.search(source):
        missing = [file for file in files if not os.path.isfile(file)] or ([] if files else [source])
        if missing:
            raise UserError(f"train_data {source}: there is no {missing[0]} ({len(missing)} missing in all).")
    return files


def expand_braces(pattern: str) -> list[str]:
    """Return the names that the groups in braces of a pattern stand for, as a shell expands them.

    Raises:
        UserError: they are more than `MAX_NAMES`.
    """
    names: list[str] = []
    for name in _expand_first_group(pattern):
        names.append(name)
        if len(names) > MAX_NAMES:
            raise UserError(f"train_data {pattern} stands for more than {MAX_NAMES} names.")
    return names


def list_files(folder: str) -> list[str]:
    """Return the files of a folder and its subfolders, sorted; links to folders are followed, each folder once.

    Names that begin with a dot are left out.
    """
    files, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def count_deeper_tars(source: str) -> int:
    """Return the number of tars in subfolders of a folder that has tars itself, which `expand` leaves out."""
    folder = os.path.expanduser(source)
    if not os.path.isdir(folder) or not any(map(is_tar, os.listdir(folder))):
        return 0
    return sum(is_tar(file) and os.path.dirname(file) != folder.rstrip("/") for file in list_files(folder))


def is_tar(name: str) -> bool:
    """Return whether a file name is a tar's."""
    return name.lower().endswith(".tar")


def _expand_first_group(pattern: str) -> Iterator[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        yield pattern
        return
    before, after = pattern[: group.start()], pattern[group.end() :]
    for value in _values(group[1]):
        yield from _expand_first_group(before + value + after)


def _values(group: str) -> Iterator[str]:
    """Iterate over the values of a group: `3..12`, `00..10..2`, `a..f` or `a,b`."""
    if letters := re.fullmatch(r"([A-Za-z])\.\.([A-Za-z])", group):
        first, last = ord(letters[1]), ord(letters[2])
        yield from map(chr, range(first, last + 1) if first <= last else range(first, last - 1, -1))
    elif span := re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.-?(\d+))?", group):
        first, last, step = int(span[1]), int(span[2]), int(span[3] or 1) or 1
        is_padded = any(len(bound) > 1 and bound.startswith("0") for bound in (span[1], span[2]))
        width = max(len(span[1]), len(span[2])) if is_padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        yield from (str(number).zfill(width) for number in numbers)
    else:
        yield from group.split(",")


def _match(name: str) -> list[str]:
    if GLOB_CHARACTERS.search(name) and not os.path.exists(name):
        return sorted(glob.glob(name, recursive=True))
    return [name]


def _list_folder(folder: str) -> list[str]:
    """Return the tars of a folder and its subfolders, or the folder itself if it has none."""
    top = sorted(str(path) for path in Path(folder).iterdir() if is_tar(path.name))
    files = top or list_files(folder)
    if compressed := [name for name in [*os.listdir(folder), *files] if COMPRESSED_TAR.search(name)]:
        raise UserError(
            f"train_data {folder} holds compressed tars ({compressed[0]}): decompress them, since pairs are read at "
            "random places."
        )
    if top:
        return top  # subfolders beside them may be other splits, see `count_deeper_tars`
    tars = [file for file in files if is_tar(file)]
    if not tars:
        return [folder]
    others = (*IMAGE_EXTENSIONS, *TABLE_EXTENSIONS)
    if other := next((file for file in files if file.rpartition(".")[2].lower() in others), None):
        raise UserError(
            f"train_data {folder} holds tars ({tars[0]}) beside other data ({other}): name one kind by a pattern, "
            f"such as {os.path.join(folder, '**', '*.tar')}."
        )
    return tars
