"""Image-text pairs of tables, read through `datasets`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.image_values import check_image_values, resolve_image
from training.data.pairs import OPEN_CLIP_COLUMNS, RowPairs, check_columns, named_columns, usable_captions


@dataclass
class Table:
    """A loaded table.

    Attributes:
        rows: the table.
        folder: where relative paths of images begin.
        notes: remarks on what was left out.
        has_records: whether its rows are JSON, see `training.data.records`.
    """

    rows: datasets.Dataset
    folder: Path
    notes: tuple[str, ...] = ()
    has_records: bool = False


class TablePairs(RowPairs):
    """The rows of a `datasets` table; arguments are those of `RowPairs`.

    Captions may be text, numbers (used as text) or lists of texts, of which training draws one each time. Images may be
    paths, relative to the table or to the working folder, encoded bytes in any form, or base64 text.
    """

    def __init__(
        self, rows: datasets.Dataset, source: str, config: DataConfig, folder: Path, notes: tuple[str, ...] = ()
    ):
        super().__init__(rows, source, config, folder, notes)
        rows = rows.with_format(None)  # a saved set may have torch's or NumPy's
        rows = rename_open_clip_columns(rows, named_columns(config))
        types = {field.name: field.type for field in rows.features.arrow_schema}
        check_columns(config, source, {name: _example(type_) for name, type_ in types.items()})
        for column in (config.caption_column, *config.further_caption_columns):
            if not _is_caption_type(types[column]):
                kind = "images" if isinstance(rows.features[column], datasets.Image) else str(types[column])
                raise UserError(f"caption_column {column!r} of {source} is {kind}; every caption must be text.")
        # Other columns are not read, and need not be readable.
        rows = rows.select_columns([name for name in rows.column_names if name in named_columns(config)])
        if isinstance(rows.features[self.image_column], datasets.Image) or pa.types.is_binary(types[self.image_column]):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self.rows = rows
        # Read once: each access of `Dataset.features` copies them.
        self.class_names = {name: f.names for name, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}
        check_image_values(rows, self.image_column, source, folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        for name in self.class_names:
            row[name] = self._name_class(name, row[name])
        return {**row, self.image_column: resolve_image(row[self.image_column], self.folder)}

    def captions(self) -> Iterator[str]:
        column, values = self.caption_column, self.rows[self.caption_column]
        if column in self.class_names:
            values = (self._name_class(column, value) for value in values)
        return usable_captions(iter(values))

    def column(self, name: str) -> list[Any]:
        return self.rows[name]

    def _name_class(self, column: str, value: int | None) -> str | None:
        """Return the name of a class that a column holds as a number; -1 stands for no label."""
        return None if value is None or value < 0 else self.class_names[column][value]


def rename_open_clip_columns(rows: datasets.Dataset, named: Collection[str]) -> datasets.Dataset:
    """Rename `filepath` and `title`, the columns of open_clip's tables, to `image` and `caption`, unless named."""
    columns = rows.column_names
    if not set(OPEN_CLIP_COLUMNS) <= set(columns) or set(OPEN_CLIP_COLUMNS) & set(named):
        return rows
    return rows.rename_columns({old: new for old, new in OPEN_CLIP_COLUMNS.items() if new not in columns})


def _example(type_: pa.DataType) -> Any:
    """Return a value like those of a column."""
    if _is_list(type_):
        return []
    if pa.types.is_struct(type_) or pa.types.is_map(type_):
        return {}
    return None if pa.types.is_null(type_) else "" if _is_text(type_) else 0


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _is_caption_type(type_: pa.DataType) -> bool:
    """Return whether values are text, are used as text, or are lists of such values."""
    if _is_list(type_):
        return _is_text(type_.value_type)
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return _is_text(type_) or is_number or pa.types.is_null(type_)
