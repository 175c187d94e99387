"""Tables that are converted to Arrow files, which all processes and workers map instead of holding copies."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub.constants import HF_HOME


BATCH_ROWS, BATCH_CHARACTERS = 10_000, 2**26

Records = Callable[[], Iterable[dict[str, Any]]]


def convert_table(make_records: Records, schema: pa.Schema, identity: object) -> tuple[datasets.Dataset, str | None]:
    """Return a table that is mapped from a file of the cache, converted first if it is not there.

    Args:
        make_records: returns the rows as {column: value}.
        schema: types of the columns.
        identity: names of the sources with their sizes and times; a change of its `repr` makes another file.

    Returns:
        The table, and why it is in memory instead; None if it is not.
    """
    digest = hashlib.sha256(repr((schema, identity)).encode("utf-8", "surrogatepass")).hexdigest()
    path = Path(HF_HOME) / "amorlip" / "tables" / f"{digest[:32]}.arrow"
    if (rows := _map_table(path)) is not None:
        return rows, None
    batches = _make_batches(make_records(), schema)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_batches(path, batches, schema)
    except OSError as error:
        note = f"{path.parent} cannot be written ({error.strerror}): the table stays in memory of every worker"
        table = pa.Table.from_batches(_make_batches(make_records(), schema), schema)
        return datasets.Dataset(datasets.table.InMemoryTable(table)), note
    return datasets.Dataset.from_file(str(path)), None


def file_state(file: str | Path) -> tuple[str, int, int]:
    """Return what identifies a file and its content: name, size and time."""
    status = os.stat(file)
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def _map_table(path: Path) -> datasets.Dataset | None:
    """Return the table of an Arrow file; None if the file is missing, cut or damaged."""
    try:
        return datasets.Dataset.from_file(str(path))
    except (OSError, pa.ArrowException, ValueError):
        return None


def _make_batches(records: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    characters = 0
    for record in records:
        rows.append(record)
        characters += sum(len(value) for value in record.values() if isinstance(value, str))
        if len(rows) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield pa.RecordBatch.from_pylist(rows, schema)
            rows, characters = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema)


def _write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write an Arrow stream atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache
def choose_cache() -> tuple[str | None, str | None]:
    """Return the folder that `datasets` converts tables in (None for its own), and a remark if it is not its own."""
    usual = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return None, None
    except OSError as error:
        folder = tempfile.mkdtemp(prefix="amorlip_tables_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder, f"{usual} cannot be written ({error.strerror}): tables are converted in {folder}; set HF_HOME"
