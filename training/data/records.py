"""Image-text pairs of records, such as the lines of a JSON file, whose values stay as they are written.

`datasets` guesses a type for every column: texts that look like dates become times, "007" becomes 7.0, and a column of
texts and numbers is refused. Here a record is kept as JSON, and parsed when its pair is read, as that of a tar's pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.image_values import check_image_values, resolve_image
from training.data.pairs import OPEN_CLIP_COLUMNS, RowPairs, check_columns, named_columns, usable_captions


RECORD = "record"
SCHEMA = pa.schema([(RECORD, pa.large_string())])
SPACE = b"\xef\xbb\xbf \t\r\n"  # with the mark that some editors put at the beginning of UTF-8
MAX_EXAMPLES = 1000  # records that are read for the names of columns


class RecordPairs(RowPairs):
    """The records of a table with one column, `RECORD`, of JSON objects; arguments are those of `RowPairs`."""

    def __init__(
        self, rows: datasets.Dataset, source: str, config: DataConfig, folder: Path, notes: tuple[str, ...] = ()
    ):
        super().__init__(rows, source, config, folder, notes)
        self.columns = named_columns(config)
        examples: dict[str, Any] = {}
        for index in range(0, len(rows), max(1, len(rows) // MAX_EXAMPLES)):
            for name, value in self._parse(rows[index]).items():
                if examples.get(name) is None:
                    examples[name] = value
        check_columns(config, source, examples)
        check_image_values(_ParsedRows(self), self.image_column, source, folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._parse(self.rows[index])
        return {**row, self.image_column: resolve_image(row.get(self.image_column), self.folder)}

    def captions(self) -> Iterator[str]:
        return usable_captions(self._parse(row).get(self.caption_column) for row in self.rows)

    def column(self, name: str) -> list[Any]:
        values = (self._parse(row).get(name) for row in self.rows)
        return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]

    def _parse(self, row: Mapping[str, str]) -> dict[str, Any]:
        """Return the columns of a record, those that open_clip's tables have under the names that are configured."""
        record = json.loads(row[RECORD])
        if set(OPEN_CLIP_COLUMNS) <= set(record) and not set(OPEN_CLIP_COLUMNS) & set(self.columns):
            for old, new in OPEN_CLIP_COLUMNS.items():
                record.setdefault(new, record[old])
        return record


class _ParsedRows:
    """Rows of `RecordPairs` with their images as they are written."""

    def __init__(self, pairs: RecordPairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pairs = self.pairs
        return {pairs.image_column: None, **pairs._parse(pairs.rows[index])}


def read_json(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """Iterate over the records of files that hold JSON lines, or one list of objects.

    Raises:
        UserError: a file is not laid out so, naming the line.
    """
    for file in files:
        with open(file, "rb") as stream:
            is_list = stream.read(256).lstrip(SPACE)[:1] == b"["
            stream.seek(0)
            if is_list:
                records = _parse_json(stream.read(), file, 1)
                yield from make_records(
                    _check_object(record, file, f"entry {i + 1}") for i, record in enumerate(records)
                )
                continue
            for number, line in enumerate(stream, 1):
                if line := line.strip(SPACE):
                    _check_object(_parse_json(line, file, number), file, f"line {number}")
                    yield {RECORD: line.decode()}


def make_records(objects: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Iterate over objects as records."""
    return ({RECORD: json.dumps(item)} for item in objects)


def _parse_json(text: bytes, file: str, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += text[: error.start].count(b"\n")
        raise UserError(
            f"train_data {file} is not UTF-8 (line {line}: byte {text[error.start]:#x}): convert it, for example with "
            "iconv -f latin1 -t utf-8."
        ) from None
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", None) or error
        raise UserError(
            f"train_data {file}: line {line} cannot be read as JSON ({reason}): write one object per line, or one list "
            "of objects."
        ) from None


def _check_object(value: Any, file: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"train_data {file}: {where} is {str(value)[:50]!r}, which is no object with columns.")
    return value
