"""Load tables: files, folders of images, saved data sets and data sets of the Hub."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from eval.tables import leave_out_empty
from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.arrow_files import choose_cache, convert_table
from training.data.csv_rows import find_separator, read_rows
from training.data.tables import OPEN_CLIP_COLUMNS
from training.data.tar import LFS_POINTER
from training.data.tar_pairs import IMAGE_EXTENSIONS


TABLE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Table:
    """A loaded table.

    Attributes:
        rows: the table.
        folder: where relative paths of images begin.
        notes: remarks on what was left out.
    """

    rows: datasets.Dataset
    folder: Path
    notes: tuple[str, ...] = ()


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
        return _load_dataset(source, path.parent, split=config.train_split)
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
    if TABLE_LOADERS[suffix] == "csv":
        return _load_csv(source, files, config)
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise UserError(f"train_data {source}: {empty[0]} is empty.")
    if pointers := [file for file in files if _is_pointer(file)]:
        raise UserError(f"train_data {source}: {pointers[0]} is a Git LFS pointer; fetch the file with git lfs pull.")
    if suffix == ".json" and len(files) == 1 and (coco := _load_coco(files[0], config)) is not None:
        return coco
    if suffix == ".parquet" and not (files := leave_out_empty(files)):
        raise UserError(f"train_data {source} has no rows.")
    return _load_dataset(TABLE_LOADERS[suffix], folder, data_files={split: files}, split=split)


def _is_pointer(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _load_dataset(path: str, folder: Path, split: str, data_files: dict[str, list[str]] | None = None) -> Table:
    """Load a table by `datasets`, converted outside its cache where that cannot be written."""
    cache, note = choose_cache()
    rows = datasets.load_dataset(path, data_files=data_files, split=split, cache_dir=cache)
    return Table(rows, folder, (note,) if note else ())


def _load_csv(source: str, files: list[str], config: DataConfig) -> Table:
    """Load CSV and TSV files."""
    separator = config.csv_separator
    if separator is None:
        columns = [{config.image_column, config.caption_column}, set(OPEN_CLIP_COLUMNS)]
        separator = find_separator(files[0], columns) or ("\t" if files[0].lower().endswith(".tsv") else ",")
    header = next(read_rows(files[0], separator), None)
    if header is None:
        raise UserError(f"train_data {source} has no rows.")
    if len(set(header)) < len(header):
        raise UserError(f"train_data {source}: the header names a column twice: {header}.")
    rows, note = convert_table(
        functools.partial(_csv_records, files, separator, header),
        pa.schema([(name, pa.string()) for name in header]),
        (separator, [_file_state(file) for file in files]),
    )
    return Table(rows, Path(files[0]).parent, (note,) if note else ())


def _file_state(file: str | Path) -> tuple[str, int, int]:
    status = os.stat(file)
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def _csv_records(files: list[str], separator: str, header: list[str]) -> Iterator[dict[str, str | None]]:
    """Iterate over the rows of files as {column: text}; a row with too many or too few fields has None for all."""
    for file in files:
        rows = read_rows(file, separator)
        if next(rows, None) != header:
            raise UserError(f"train_data {file} has another header than {files[0]}.")
        for fields in rows:
            # The pair is listed as unusable when training reaches it.
            yield dict(zip(header, fields if len(fields) == len(header) else [None] * len(header), strict=True))


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
    rows, note = convert_table(lambda: records, schema, _file_state(file))
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
    if (table := _load_images_with_texts(folder, config)) is not None:
        return table
    return _load_dataset(str(folder), folder, split)


def _load_images_with_texts(folder: Path, config: DataConfig) -> Table | None:
    """Load images with a `.txt` of the same name beside them; None if the folder is laid out otherwise."""
    root = folder / config.train_split if (folder / config.train_split).is_dir() else folder
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    if any(path.name in METADATA_FILES or path.suffix.lower() in TABLE_LOADERS for path in files):
        return None
    images = [path for path in files if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    pairs = [(str(path), texts[path.with_suffix("")]) for path in images if path.with_suffix("") in texts]
    if not pairs:
        return None
    captions = [text.read_text(encoding="utf-8", errors="surrogateescape").strip() for _, text in pairs]
    records = [
        {config.image_column: image, config.caption_column: caption}
        for (image, _), caption in zip(pairs, captions, strict=True)
        if _is_utf8(caption)
    ]
    schema = pa.schema([(config.image_column, pa.string()), (config.caption_column, pa.string())])
    rows, note = convert_table(lambda: records, schema, [_file_state(text) for _, text in pairs])
    counts = {
        "images without a caption": len(images) - len(pairs),
        "captions without an image": len(texts) - len({text for _, text in pairs}),
        "captions that are not UTF-8": len(pairs) - len(records),
    }
    ignored = ", ".join(f"{count} {cause}" for cause, count in counts.items() if count)
    return Table(rows, folder, tuple(filter(None, (f"ignored: {ignored}" if ignored else None, note))))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
