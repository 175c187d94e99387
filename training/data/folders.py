"""Folders of images: with tables that name them, or with a text or a JSON file of the same name beside each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.tables import SPLIT_ALIASES
from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.arrow_files import convert_table, file_state
from training.data.csv_rows import read_header, read_records
from training.data.patterns import list_files
from training.data.records import RECORD, SCHEMA, make_records, read_json
from training.data.tables import Table
from training.data.tar import TarMember
from training.data.tar_pairs import IMAGE_EXTENSIONS, TarContents, TarPair, group_members, split_name


METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"


def find_split(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself where it is not divided into splits.

    Raises:
        UserError: it is divided, and does not have this split.
    """
    aliases = next((names for name, names in SPLIT_ALIASES.items() if split in (name, *names)), (split,))
    for name in (split, *aliases):
        if (folder / name).is_dir():
            return folder / name
    others = [name for names in SPLIT_ALIASES.values() for name in names if (folder / name).is_dir()]
    if others or split != "train":
        kind = f"its splits: {others}" if others else "a folder without splits"
        raise UserError(f"train_split {split!r} is not in {folder}, {kind}.")
    return folder


def load_with_metadata(folder: Path, source: str, config: DataConfig) -> Table | None:
    """Load the images that `metadata.csv` or `metadata.jsonl` name in the column `file_name`; None without such a file.

    Raises:
        UserError: a file cannot be read, or lacks the column.
    """
    files = list_files(str(folder))
    metadata = [file for file in files if Path(file).name in METADATA_FILES]
    if not metadata:
        return None
    root = find_split(folder, config.train_split)
    rows, note = convert_table(
        lambda: make_records(_metadata_rows(metadata, root, config)),
        SCHEMA,
        ("metadata", str(root), config.image_column, config.csv_separator, [file_state(file) for file in metadata]),
    )
    images = [file for file in files if root in Path(file).parents and split_name(file)[1] in IMAGE_EXTENSIONS]
    unnamed = len(images) - len(rows)
    notes = (f"ignored: {unnamed} images that no metadata names" if unnamed > 0 else None, note)
    return Table(rows, folder, tuple(filter(None, notes)), has_records=True)


def _metadata_rows(files: list[str], root: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Return the rows whose images lie in a folder, with their paths, in the order of the paths."""
    found = []
    for file in files:
        if file.endswith(".csv"):
            header, separator = read_header([file], config.csv_separator, [{FILE_NAME}])
            rows: Iterable[dict[str, Any]] = read_records([file], separator, header)
        else:
            rows = (json.loads(record[RECORD]) for record in read_json([file]))
        for row in rows:
            if FILE_NAME not in row:
                raise UserError(f"train_data {file} has no column {FILE_NAME}; its columns: {sorted(row)}.")
            name = row.pop(FILE_NAME)
            path = os.path.normpath(Path(file).parent / str(name))
            if name is None or root in Path(path).parents:
                found.append({**row, config.image_column: None if name is None else path})
    return sorted(found, key=lambda row: row[config.image_column] or "")


def load_with_files_beside(folder: Path, config: DataConfig) -> Table | None:
    """Load images with a text or a JSON file of the same name beside them, grouped as the members of a tar are.

    Returns:
        None if there is no such pair.
    """
    files = sorted(list_files(str(folder)), key=lambda file: Path(file).parts)
    if not _group_files(files, folder).pairs:
        return None
    root = find_split(folder, config.train_split)
    files = [file for file in files if root in Path(file).parents]
    contents = _group_files(files, root)
    parts = [[files[part.offset] for part in (pair.image, pair.text, pair.json) if part] for pair in contents.pairs]
    rows, note = convert_table(
        lambda: make_records(_read_pair(pair, files, config) for pair in contents.pairs),
        SCHEMA,
        (config.image_column, config.caption_column, [(image, *map(file_state, others)) for image, *others in parts]),
    )
    ignored = ", ".join(f"{count} {cause}" for cause, count in contents.ignored.most_common())
    notes = (f"ignored: {ignored}" if ignored else None, note)
    return Table(rows, folder, tuple(filter(None, notes)), has_records=True)


def _group_files(files: list[str], root: Path) -> TarContents:
    """Return the pairs that files form, whose offsets are numbers of files."""
    return group_members(TarMember(os.path.relpath(file, root), "0", i, 0) for i, file in enumerate(files))


def _read_pair(pair: TarPair, files: list[str], config: DataConfig) -> dict[str, Any]:
    """Return the columns of a pair; those that cannot be read are missing, and training lists the pair."""
    record: dict[str, Any] = {}
    try:
        if pair.json is not None:
            record = dict(json.loads(Path(files[pair.json.offset]).read_bytes()))
        if pair.text is not None:
            text = Path(files[pair.text.offset]).read_text("utf-8-sig", errors="surrogateescape").strip()
            record = {config.caption_column: text, **record, "caption": text}
    except (ValueError, TypeError, RecursionError):
        record = {config.caption_column: None}
    return {**record, config.image_column: files[pair.image.offset]}
