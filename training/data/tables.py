"""Image-text pairs of tables and folders, through `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.pairs import Pairs


TEXT = ("string", "large_string")


TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


class TablePairs(Pairs):
    """Rows of a `datasets` table."""

    def __init__(self, rows: datasets.Dataset, source: str, arguments: PretrainConfig):
        self.source, self.rows, self.shard_sizes = source, rows, [len(rows)]
        self.caption_column = arguments.caption_column
        if len(rows) == 0:
            raise UserError(f"train_data {source} has no rows.")
        columns = rows.column_names
        if {"filepath", "title"} <= set(columns):  # open_clip's names
            self.rows = rows = rows.rename_columns(
                {old: new for old, new in (("filepath", "image"), ("title", "caption")) if new not in columns}
            )
        fields = ("image_column", "caption_column", "alternative_captions_column", "keywords_column", "group_column")
        for field in fields:
            column = getattr(arguments, field)
            if column is not None and column not in rows.column_names:
                raise UserError(f"{field} {column!r} is not in {source}; its columns: {rows.column_names}.")
        for column in arguments.further_caption_columns:
            if column not in rows.column_names:
                raise UserError(
                    f"further_caption_columns: {column!r} is not in {source}; its columns: {rows.column_names}."
                )
        if (kind := _dtype(rows, self.caption_column)) not in TEXT:
            column = f"caption_column {self.caption_column!r} of {source}"
            raise UserError(f"{column} is {kind}; every caption must be text.")
        self.image_column, self.folder = arguments.image_column, Path(source).parent
        if _dtype(rows, self.image_column) not in TEXT:
            self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = row[self.image_column]
        if isinstance(image, dict):
            image = image["path"] if image.get("bytes") is None else image["bytes"]
        if isinstance(image, str) and not os.path.isabs(image) and not os.path.exists(image):
            image = str(self.folder / image)  # a table's paths may be relative to it
        return {**row, self.image_column: image}

    def describe(self, index: int) -> tuple[str, str]:
        return f"row {index}", self.source

    def captions(self) -> Iterator[str]:
        return (text for text in self.rows[self.caption_column] if isinstance(text, str))

    def column(self, name: str) -> list:
        return self.rows[name]


def _dtype(rows: datasets.Dataset, column: str) -> str:
    return getattr(rows.features[column], "dtype", "struct")


def _load_table(source: str, files: list[str], split: str) -> datasets.Dataset:
    path, options = Path(source), {"split": split}
    try:
        if files != [source] or path.is_file():
            suffix = Path(files[0]).suffix
            if suffix not in TABLES:
                raise UserError(f"train_data {source}: unknown kind of file; use .tar or one of {', '.join(TABLES)}.")
            if suffix == ".tsv":
                options["sep"] = "\t"
            return datasets.load_dataset(TABLES[suffix], data_files={split: files}, **options)
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(source)
        if path.is_dir():
            if not any(path.iterdir()):
                raise UserError(f"train_data {source} is an empty folder.")
            return datasets.load_dataset(source, **options)
        if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix:
            raise UserError(f"train_data {source}: there is no such file or folder.")
        return datasets.load_dataset(source, **options)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; the user needs the source and the reason
        if "corresponds to no data" in str(error):
            raise UserError(f"train_data {source} has no rows.") from None
        raise UserError(f"train_data {source} (split {split!r}) cannot be read: {error}") from None
