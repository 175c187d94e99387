"""Image-text pairs of tables and folders, read through `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.pairs import Pairs, usable_captions


TABLE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
TEXT_TYPES = ("string", "large_string")


class TablePairs(Pairs):
    """The rows of a `datasets` table.

    Args:
        rows: the table.
        source: the entry of `train_data` that names it.
        config: names of columns.

    Raises:
        UserError: the table has no rows, a column is missing, or captions are not text.
    """

    def __init__(self, rows: datasets.Dataset, source: str, config: DataConfig):
        if len(rows) == 0:
            raise UserError(f"train_data {source} has no rows.")
        self.source, self.shard_sizes = source, [len(rows)]
        self.caption_column, self.image_column = config.caption_column, config.image_column
        self.folder = Path(source).parent
        rows = _rename_open_clip_columns(rows)
        _check_columns(rows, source, config)
        if _type_name(rows, self.image_column) not in TEXT_TYPES:
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = row[self.image_column]
        if isinstance(image, dict):
            image = image["path"] if image.get("bytes") is None else image["bytes"]
        if isinstance(image, str) and not os.path.isabs(image) and not os.path.exists(image):
            image = str(self.folder / image)  # paths may be relative to the table
        return {**row, self.image_column: image}

    def describe(self, index: int) -> tuple[str, str]:
        return f"row {index}", self.source

    def captions(self) -> Iterator[str]:
        return usable_captions(self.rows[self.caption_column])

    def column(self, name: str) -> list[Any]:
        return self.rows[name]


def load_table(source: str, files: list[str], split: str) -> datasets.Dataset:
    """Load a table of files, a saved data set, an image folder or a data set of the Hub.

    Args:
        source: the entry of `train_data`.
        files: the files that it stands for.
        split: the split to load.

    Raises:
        UserError: the source does not exist, cannot be read or has no rows.
    """
    try:
        if files != [source] or Path(source).is_file():
            return _load_files(source, files, split)
        if Path(source).is_dir():
            return _load_folder(source, split)
        if Path(source).is_absolute() or source.startswith(".") or source.count("/") != 1 or Path(source).suffix:
            raise UserError(f"train_data {source}: there is no such file or folder.")
        return datasets.load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds
        if "corresponds to no data" in str(error):
            raise UserError(f"train_data {source} has no rows.") from None
        raise UserError(f"train_data {source} (split {split!r}) cannot be read: {error}") from None


def _load_files(source: str, files: list[str], split: str) -> datasets.Dataset:
    suffix = Path(files[0]).suffix
    if suffix not in TABLE_LOADERS:
        raise UserError(f"train_data {source}: unknown kind of file; use .tar or one of {', '.join(TABLE_LOADERS)}.")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(TABLE_LOADERS[suffix], data_files={split: files}, split=split, **options)


def _load_folder(source: str, split: str) -> datasets.Dataset:
    folder = Path(source)
    if (folder / "dataset_info.json").exists():
        return datasets.load_from_disk(source)
    if not any(folder.iterdir()):
        raise UserError(f"train_data {source} is an empty folder.")
    return datasets.load_dataset(source, split=split)


def _rename_open_clip_columns(rows: datasets.Dataset) -> datasets.Dataset:
    """Rename `filepath` and `title`, the columns of open_clip's tables, to `image` and `caption`."""
    columns = rows.column_names
    if not {"filepath", "title"} <= set(columns):
        return rows
    names = {"filepath": "image", "title": "caption"}
    return rows.rename_columns({old: new for old, new in names.items() if new not in columns})


def _check_columns(rows: datasets.Dataset, source: str, config: DataConfig) -> None:
    """Raise `UserError` for a column that the configuration names and the table lacks, and for captions of no text."""
    fields = ("image_column", "caption_column", "alternative_captions_column", "keywords_column", "group_column")
    columns = [(field, getattr(config, field)) for field in fields]
    columns += [("further_caption_columns", name) for name in config.further_caption_columns]
    for field, column in columns:
        if column is not None and column not in rows.column_names:
            raise UserError(f"{field} {column!r} is not in {source}; its columns: {rows.column_names}.")
    if (type_name := _type_name(rows, config.caption_column)) not in TEXT_TYPES:
        column = f"caption_column {config.caption_column!r} of {source}"
        raise UserError(f"{column} is {type_name}; every caption must be text.")


def _type_name(rows: datasets.Dataset, column: str) -> str:
    return getattr(rows.features[column], "dtype", "struct")
