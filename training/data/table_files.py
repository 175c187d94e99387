"""Load tables: files, folders of images, saved data sets and data sets of the Hub."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa

from eval.tables import leave_out_empty
from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.arrow_files import choose_cache, convert_table, file_state
from training.data.csv_rows import read_header, read_records
from training.data.folders import METADATA_FILES, load_with_files_beside, load_with_metadata
from training.data.pairs import OPEN_CLIP_COLUMNS
from training.data.patterns import list_files
from training.data.records import SCHEMA, read_json
from training.data.remote import copy_tables, download_folder, is_remote
from training.data.tables import Table
from training.data.tar import LFS_POINTER


TABLE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load_table(source: str, files: list[str], config: DataConfig) -> Table:
    """Load the table that an entry of `train_data` names.

    Args:
        source: the entry.
        files: the files that it stands for.
        config: split, columns and separator.

    Raises:
        UserError: the source does not exist, cannot be read or has no rows.
    """
    path = Path(os.path.expanduser(source))
    try:
        if len(files) != 1 or Path(files[0]).is_file():
            return _load_files(source, files, config)
        if path.is_dir():
            return _load_folder(path, source, config)
        if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix:
            raise UserError(f"train_data {source}: there is no such file or folder.")
        return _load_dataset(source, source, path.parent, config)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds
        if "corresponds to no data" in str(error):
            raise UserError(f"train_data {source} has no rows.") from None
        cause = find_root_cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(f"train_data {source} (split {config.train_split!r}) cannot be read: {reason}") from None


def find_root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain, which says what is wrong with a file."""
    while not isinstance(error, UserError):
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            break
        error = cause
    return error


def _load_files(source: str, files: list[str], config: DataConfig) -> Table:
    suffix, split = Path(files[0]).suffix.lower(), config.train_split
    folder = Path(files[0]).parent
    if suffix not in TABLE_LOADERS:
        raise UserError(f"train_data {source}: unknown kind of file; use .tar or one of {', '.join(TABLE_LOADERS)}.")
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise UserError(f"train_data {source}: {empty[0]} is empty.")
    if pointers := [file for file in files if _is_pointer(file)]:
        raise UserError(f"train_data {source}: {pointers[0]} is a Git LFS pointer; fetch the file with git lfs pull.")
    if suffix in TEXT_LOADERS:
        return TEXT_LOADERS[suffix](source, files, config)
    if suffix == ".parquet" and not (files := leave_out_empty(files)):
        raise UserError(f"train_data {source} has no rows.")
    return _load_dataset(
        TABLE_LOADERS[suffix], source, folder, config, data_files={split: [glob.escape(file) for file in files]}
    )


def _is_pointer(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _load_dataset(
    path: str, source: str, folder: Path, config: DataConfig, data_files: dict[str, list[str]] | None = None
) -> Table:
    """Load a table by `datasets`, converted outside its cache where that cannot be written; text is read here."""
    cache, note = choose_cache()
    ignored: list[str] = []
    if data_files is None:
        builder = datasets.load_dataset_builder(path, cache_dir=cache)
        split_files = builder.config.data_files or {}
        ignored = _note_other_tables(path, {file for members in split_files.values() for file in members})
        files = list(split_files.get(config.train_split, []))
        if any(is_remote(file) and PurePosixPath(file).name in METADATA_FILES for file in files):
            return _load_folder(download_folder(source), source, config)
        suffixes = {PurePosixPath(file).suffix.lower() for file in files}
        if suffixes and suffixes <= set(TEXT_LOADERS) and len({TEXT_LOADERS[suffix] for suffix in suffixes}) == 1:
            local = copy_tables(files) if any(is_remote(file) for file in files) else files
            table = TEXT_LOADERS[suffixes.pop()](source, local, config)
            return dataclasses.replace(table, notes=(*table.notes, *ignored))
    rows = datasets.load_dataset(path, data_files=data_files, split=config.train_split, cache_dir=cache)
    return Table(rows, folder, (*ignored, note) if note else tuple(ignored))


def _note_other_tables(path: str, read: set[str]) -> list[str]:
    """Return a remark on the tables of a folder that `datasets`, which reads the most frequent kind, leaves out."""
    tables = [file for file in list_files(path) if Path(file).suffix.lower() in TABLE_LOADERS]
    others = [os.path.relpath(file, path) for file in tables if os.path.abspath(file) not in read]
    return [f"ignored: {len(others)} tables of other kinds, such as {others[0]}"] if others else []


def _load_csv(source: str, files: list[str], config: DataConfig) -> Table:
    """Load CSV and TSV files."""
    columns = [{config.image_column, config.caption_column}, set(OPEN_CLIP_COLUMNS)]
    header, separator = read_header(files, config.csv_separator, columns)
    rows, note = convert_table(
        functools.partial(read_records, files, separator, header),
        pa.schema([(name, pa.string()) for name in header]),
        (separator, [file_state(file) for file in files]),
    )
    return Table(rows, Path(files[0]).parent, (note,) if note else ())


def _load_json(source: str, files: list[str], config: DataConfig) -> Table:
    """Load files of JSON, one of which may be COCO's captions."""
    if len(files) == 1 and (coco := _load_coco(files[0], config)) is not None:
        return coco
    identity = ("json", [file_state(file) for file in files])
    rows, note = convert_table(functools.partial(read_json, files), SCHEMA, identity)
    return Table(rows, Path(files[0]).parent, (note,) if note else (), has_records=True)


TEXT_LOADERS = {".csv": _load_csv, ".tsv": _load_csv, ".json": _load_json, ".jsonl": _load_json}


def _load_coco(file: str, config: DataConfig) -> Table | None:
    """Load a file of COCO captions, one row per image with the list of its captions; None for other files."""
    with open(file, "rb") as stream:
        if stream.read(256).lstrip()[:1] != b"{":
            return None
        stream.seek(0)
        try:
            content = json.load(stream)
        except ValueError:
            return None  # JSON lines begin with a brace as well
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        return None
    try:
        captions = _collect_captions(content["annotations"])
        images = [image for image in content["images"] if image["id"] in captions]
        names = [image["file_name"] for image in images]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"train_data {file} is not laid out as COCO's captions ({type(error).__name__}: {error})."
        ) from None
    if not images:
        raise UserError(
            f"train_data {file} has no image with a caption: name COCO's captions_*.json, whose annotations have "
            "image_id, the id of an image, and caption."
        )
    records = [
        {config.image_column: image["file_name"], config.caption_column: captions[image["id"]]} for image in images
    ]
    schema = pa.schema([(config.image_column, pa.string()), (config.caption_column, pa.list_(pa.string()))])
    rows, note = convert_table(lambda: records, schema, file_state(file))
    missing = len(content["images"]) - len(images)
    notes = (f"ignored: {missing} images without a caption" if missing else None, note)
    return Table(rows, _find_images(Path(file), names), tuple(filter(None, notes)))


def _collect_captions(annotations: list[dict[str, Any]]) -> dict[Any, list[str]]:
    """Return the captions of each image, without those that are no text."""
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        caption = annotation.get("caption")
        if isinstance(caption, str) and _is_utf8(caption):
            captions.setdefault(annotation["image_id"], []).append(caption)
    return captions


def _find_images(file: Path, names: list[str]) -> Path:
    """Return the folder that holds the images of a COCO file: its own, or one near it such as `../train2017`."""
    near = [file.parent, file.parent.parent]
    folders = [*near, *(path for folder in near for path in sorted(folder.iterdir()) if path.is_dir())]
    for folder in folders:
        if names and (folder / names[0]).is_file():
            return folder
    raise UserError(f"train_data {file}: its images ({', '.join(names[:1])}, ...) are not beside it: move them there.")


def _load_folder(folder: Path, source: str, config: DataConfig) -> Table:
    split = config.train_split
    if (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(folder))
        if split not in saved:
            raise UserError(f"train_split {split!r} is not in {source}; its splits: {sorted(saved)}.")
        return Table(saved[split], folder)
    if (folder / "dataset_info.json").exists():
        rows = datasets.load_from_disk(str(folder))
        saved_split = str(rows.split) if rows.split is not None else "train"
        if split != saved_split:
            raise UserError(f"train_split {split!r} is not in {source}, a saved data set of split {saved_split!r}.")
        return Table(rows, folder)
    if not any(folder.iterdir()):
        raise UserError(f"train_data {source} is an empty folder.")
    if (table := load_with_metadata(folder, source, config) or load_with_files_beside(folder, config)) is not None:
        return table
    return _load_dataset(str(folder), source, folder, config)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
