"""The interface of a source of image-text pairs, and the checks that all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig


MAX_CAPTION_CHARACTERS = 100_000
OPEN_CLIP_COLUMNS = {"filepath": "image", "title": "caption"}
"""Columns of open_clip's tables, and what they are called here."""


class Pairs(ABC):
    """Image-text pairs with random access.

    Attributes:
        source: the entry of `train_data` that names the source.
        shard_sizes: number of pairs in each shard, in order.
        damage: what is wrong with a shard, by file name.
    """

    source: str
    shard_sizes: list[int]
    damage: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of a pair by name, with the image as bytes or a path.

        Raises:
            Exception: whatever reading a damaged file or text raises.
        """

    @abstractmethod
    def describe(self, index: int) -> tuple[str, str]:
        """Return the key of a pair and the file that holds it, for messages."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """Iterate over the captions that training can use, without reading images."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Return the values of a column, one per pair, without reading images; None where a pair lacks it."""

    def report(self) -> str:
        """Return a line on what the source holds, and what of it is left out for which reason."""
        return f"{self.source}: {len(self)} pairs"


class RowPairs(Pairs):
    """The rows of a table.

    Args:
        rows: the table.
        source: the entry of `train_data` that names it.
        config: names of columns.
        folder: where relative paths begin.
        notes: remarks for `report`.

    Raises:
        UserError: the table has no rows, a column is missing, or a column holds values of another type.
    """

    def __init__(
        self, rows: datasets.Dataset, source: str, config: DataConfig, folder: Path, notes: tuple[str, ...] = ()
    ):
        if len(rows) == 0:
            raise UserError(f"train_data {source} has no rows.")
        self.rows, self.source, self.folder, self.notes = rows, source, folder, notes
        self.shard_sizes = [len(rows)]
        self.image_column, self.caption_column = config.image_column, config.caption_column

    def describe(self, index: int) -> tuple[str, str]:
        return f"row {index}", self.source

    def report(self) -> str:
        return "; ".join([f"{self.source}: {len(self)} pairs", *self.notes])


def check_caption(caption: Any) -> str:
    """Return a caption that training can use; numbers become text.

    Raises:
        ValueError: it is neither text nor a number, empty, too long, or no valid Unicode.
    """
    if isinstance(caption, (bool, int, float)) and caption == caption:  # NaN stands for a missing value
        caption = str(caption)
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"the caption is {str(caption)[:50]!r}; it must be text that is not empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"the caption has {len(caption)} characters")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the caption is not valid Unicode: {error.reason} at character {error.start}") from None
    return caption


def usable_captions(captions: Iterator[Any]) -> Iterator[str]:
    """Iterate over the captions that pass `check_caption`, and over those in lists."""
    for value in captions:
        for caption in value if isinstance(value, (list, tuple)) else [value]:
            try:
                yield check_caption(caption)
            except ValueError:
                continue  # training lists it when it reaches this pair


def named_columns(config: DataConfig) -> dict[str, str]:
    """Return the columns that a configuration names, each with the setting that names it."""
    fields = ("group_column", "keywords_column", "alternative_captions_column", "caption_column", "image_column")
    columns = dict.fromkeys(config.further_caption_columns, "further_caption_columns")
    return columns | {getattr(config, field): field for field in fields if getattr(config, field) is not None}


def check_columns(config: DataConfig, source: str, examples: Mapping[str, Any]) -> None:
    """Refuse columns that a source lacks, or whose values are of another type than their use needs.

    Args:
        config: names of columns.
        source: the entry of `train_data`, for the message.
        examples: a value of each column of the source; None where all values are missing.

    Raises:
        UserError: naming the setting, the column and the way out.
    """
    fields = ("image_column", "caption_column", "alternative_captions_column", "keywords_column", "group_column")
    columns = [(field, getattr(config, field)) for field in fields]
    columns += [("further_caption_columns", name) for name in config.further_caption_columns]
    for field, column in columns:
        if column is None:
            continue
        if column not in examples:
            raise UserError(f"{field} {column!r} is not in {source}; its columns: {sorted(examples)}.")
        value = examples[column]
        if field in ("alternative_captions_column", "keywords_column") and not isinstance(value, (list, type(None))):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise UserError(f"{field} {column!r} of {source} holds {kind}; it must hold lists of texts.")
        if field == "group_column" and isinstance(value, (list, dict, bytes)):
            raise UserError(f"{field} {column!r} of {source} holds {type(value).__name__}s, not single values.")
