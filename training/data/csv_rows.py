"""Rows of CSV and TSV files, read so that every line becomes a row and every value is text.

Captions often hold stray quotation marks, which the usual parsers read as the beginning of a field that swallows all
lines up to the next mark. Here a mark quotes a field only if it is closed where a field ends, and if the lines that it
would swallow are not rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from modeling_amorlip.cli_amorlip import UserError
from training.data.tar_pairs import IMAGE_EXTENSIONS


SEPARATORS = ("\t", ",", ";", "|")
QUOTE = '"'
MAX_QUOTED_LINES = 1000
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_rows(path: str, separator: str) -> Iterator[list[str]]:
    """Iterate over the rows of a file, the header included; empty lines are skipped.

    Raises:
        UserError: the file is not UTF-8.
    """
    waiting: list[str] = []
    lines = _read_lines(path)
    num_columns = 0
    while True:
        line = waiting.pop(0) if waiting else next(lines, None)
        if line is None:
            return
        if not line:
            continue
        if QUOTE not in line:
            fields = line.split(separator)
        else:
            while len(waiting) < MAX_QUOTED_LINES and (further := next(lines, None)) is not None:
                waiting.append(further)
            fields, num_lines = parse_row([line, *waiting], separator, num_columns)
            del waiting[:num_lines]
        num_columns = num_columns or len(fields)
        yield fields


def read_header(files: Sequence[str], separator: str | None, columns: Sequence[set[str]]) -> tuple[list[str], str]:
    """Return the names of columns of CSV or TSV files, and what separates them.

    Args:
        files: the files.
        separator: the separator; None finds it, as `find_separator` does with `columns`.

    Raises:
        UserError: a column is named twice, or a file has no header or another one than the first.
    """
    if separator is None:
        separator = find_separator(files[0], columns) or ("\t" if files[0].lower().endswith(".tsv") else ",")
    separator = separator.replace("\\t", "\t")  # as it is typed in a shell
    if not separator:
        raise UserError("csv_separator is empty: name a character, or leave it out to find it.")
    headers = [next(read_rows(file, separator), None) for file in files]
    header = headers[0]
    if header is None:
        raise UserError(f"train_data {files[0]} has no rows.")
    if len(set(header)) < len(header):
        raise UserError(f"train_data {files[0]}: the header names a column twice: {header}.")
    for file, other in zip(files, headers, strict=True):
        if other != header:
            raise UserError(f"train_data {file} has another header than {files[0]}.")
    return header, separator


def read_records(files: Sequence[str], separator: str, header: Sequence[str]) -> Iterator[dict[str, str | None]]:
    """Iterate over the rows of files as {column: text}; a row with too many or too few fields has None for all."""
    for file in files:
        rows = read_rows(file, separator)
        next(rows, None)
        for fields in rows:
            # The pair is listed as unusable when training reaches it.
            yield dict(zip(header, fields if len(fields) == len(header) else [None] * len(header), strict=True))


def parse_row(lines: Sequence[str], separator: str, num_columns: int) -> tuple[list[str], int]:
    """Return the fields of the row that begins at the first line, and how many further lines belong to it."""
    fields: list[str] = []
    line, rest = 0, lines[0]
    while True:
        quoted = _quoted_field(lines, line, rest, separator, num_columns) if rest.startswith(QUOTE) else None
        if quoted is not None:
            field, line, rest = quoted
        else:
            field, mark, rest = rest.partition(separator)
            rest = mark + rest
        fields.append(field)
        if not rest:
            return fields, line
        rest = rest[len(separator) :]
        if not rest:
            return [*fields, ""], line


def find_separator(path: str, columns: Sequence[set[str]]) -> str | None:
    """Return the separator that divides the header into names of columns.

    Args:
        path: the file.
        columns: sets of names, one of which the header should hold.

    Returns:
        None if no separator gives any of these sets.
    """
    header = next(_read_lines(path), "")
    for separator in SEPARATORS:
        names = set(parse_row([header], separator, 0)[0])
        if any(required_names <= names for required_names in columns):
            return separator
    return None


def _quoted_field(
    lines: Sequence[str], line: int, rest: str, separator: str, num_columns: int
) -> tuple[str, int, str] | None:
    """Return a quoted field, the line that it ends in and what follows there; None if the mark quotes nothing."""
    content, start = rest, 1
    while True:
        end = content.find(QUOTE, start)
        if end < 0:
            line += 1
            if line >= len(lines) or _is_row(lines[line], separator, num_columns):
                return None
            start = len(content)
            content += "\n" + lines[line]
        elif content.startswith(QUOTE, end + 1):
            start = end + 2
        elif end + 1 == len(content) or content.startswith(separator, end + 1):
            return content[1:end].replace(QUOTE * 2, QUOTE), line, content[end + 1 :]
        else:
            return None


def _is_row(line: str, separator: str, num_columns: int) -> bool:
    """Return whether a line is a row of its own: it has all columns, and one of them names an image."""
    fields = line.split(separator)
    return len(fields) == num_columns and any(
        field.strip(QUOTE).rpartition(".")[2].lower() in IMAGE_EXTENSIONS for field in fields
    )


def _read_lines(path: str) -> Iterator[str]:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file):
            if number == 0 and (encoding := BYTE_ORDER_MARKS.get(line[:2])):
                raise UserError(f"train_data {path} is {encoding}, not UTF-8: convert it with iconv -f {encoding}.")
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"train_data {path} is not UTF-8 (line {number + 1}: byte {line[error.start]:#x}): convert it, for "
                    "example with iconv -f latin1 -t utf-8."
                ) from None
            text = text.rstrip("\r\n")
            if number == 0 and "\r" in text:
                raise UserError(
                    f"train_data {path} ends lines by carriage returns alone: convert it with tr '\\r' '\\n'."
                )
            yield text
