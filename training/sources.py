"""Sources of image-text pairs, each a sequence with random access: tables through `datasets`, and WebDataset tars.

A tar is read where its members lie, after one pass over their headers that is kept in a cache. So pairs of tars have
numbers like rows of a table: epochs are exact, a run goes on at any of them, and neither the number of shards nor their
sizes matter to processes and workers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.constants import HF_HOME

from eval.errors import UserError

from .arguments import PretrainArguments


IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "text", "caption", "cls")
TEXT = ("string", "large_string")
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
MEMBERS = np.dtype([(f"{kind}{what}", "<i8") for kind in ("image", "text", "json") for what in ("", "_size")])
"""Where a pair's members lie in their tar, in bytes; a size of -1 says that there is none."""


class Pairs(ABC):
    """Image-text pairs by number; `shard_sizes` says which of them lie together."""

    source: str
    shard_sizes: list[int]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Columns by name, the image as bytes or a path. Raises what the file or its text is damaged by."""

    @abstractmethod
    def where(self, index: int) -> tuple[str, str]:
        """(key of the pair, the file it is in), for messages."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """All captions that are text."""

    @abstractmethod
    def column(self, name: str) -> list:
        """A column's values; raises `UserError` when there is none."""


def open_pairs(arguments: PretrainArguments) -> Mixture:
    """Everything that `train_data` names, parts divided by `::`.

    Raises:
        UserError: a source that does not exist, cannot be read, holds no pair or lacks a column.
    """
    names = [name for name in arguments.train_data.split("::") if name]
    weights = arguments.train_data_weights
    if weights and len(weights) != len(names):
        raise UserError(f"train_data_weights has {len(weights)} values for {len(names)} sources in train_data.")
    return Mixture([_open(name, arguments) for name in names])


@dataclass
class Mixture:
    """Several sources, one after the other, as one."""

    parts: list[Pairs]

    def __post_init__(self):
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, index: int) -> tuple[Pairs, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, position = self._find(index)
        return part[position]

    def where(self, index: int) -> tuple[str, str]:
        part, position = self._find(index)
        return part.where(position)

    def captions(self) -> Iterator[str]:
        return (caption for part in self.parts for caption in part.captions())

    def column(self, name: str) -> list:
        return [value for part in self.parts for value in part.column(name)]


class TablePairs(Pairs):
    """Rows of a `datasets` table."""

    def __init__(self, rows: datasets.Dataset, source: str, arguments: PretrainArguments):
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

    def where(self, index: int) -> tuple[str, str]:
        return f"row {index}", self.source

    def captions(self) -> Iterator[str]:
        return (text for text in self.rows[self.caption_column] if isinstance(text, str))

    def column(self, name: str) -> list:
        return self.rows[name]


class TarPairs(Pairs):
    """Members of WebDataset tars that share a name: an image, and its caption as txt or in json."""

    def __init__(self, shards: list[str], source: str, arguments: PretrainArguments):
        self.source, self.shards = source, shards
        index, sizes, self.damage = _read_index(shards)
        self.index, self.shard_sizes = index, sizes
        if len(index) == 0:
            reasons = "; ".join(f"{shard}: {reason}" for shard, reason in self.damage.items())
            raise UserError(f"train_data {source} has no pairs of an image and a text or json. {reasons}".strip())
        self.ends = np.cumsum(sizes)
        self.image_column, self.caption_column = arguments.image_column, arguments.caption_column
        others = ("alternative_captions_column", "keywords_column", "group_column")
        wanted = {self.caption_column, *(getattr(arguments, name) for name in others)}
        wanted |= set(arguments.further_caption_columns)
        self.needs_json = bool(wanted - {"caption", None})
        self.files: dict[int, int] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, members = self._shard(index), self.index[index]
        row: dict[str, Any] = {}
        if members["json_size"] >= 0 and (self.needs_json or members["text_size"] < 0):
            row = json.loads(self._read(shard, members, "json"))
            if not isinstance(row, dict):
                raise ValueError("its json is not an object")
        if members["text_size"] >= 0:
            row["caption"] = self._read(shard, members, "text").decode("utf-8")
        row[self.image_column] = self._read(shard, members, "image")
        return row

    def where(self, index: int) -> tuple[str, str]:
        shard = self._shard(index)
        # The name stands in the header, the 512 bytes before the content.
        header = os.pread(self._file(shard), 512, int(self.index[index]["image"]) - 512)
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        return name.rpartition(".")[0] or name, self.shards[shard]

    def captions(self) -> Iterator[str]:
        for i in range(len(self)):
            try:
                caption = self[i].get(self.caption_column)
            except (ValueError, OSError):
                continue  # met again, and listed, when it is trained on
            if isinstance(caption, str):
                yield caption

    def column(self, name: str) -> list:
        return [self[i].get(name) for i in range(len(self))]

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def _file(self, shard: int) -> int:
        if shard not in self.files:
            if len(self.files) >= 64:
                os.close(self.files.pop(next(iter(self.files))))
            self.files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self.files[shard]

    def _read(self, shard: int, members: np.void, kind: str) -> bytes:
        content = os.pread(self._file(shard), int(members[f"{kind}_size"]), int(members[kind]))
        if len(content) != members[f"{kind}_size"]:
            raise OSError(f"{self.shards[shard]} has become shorter")
        return content

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": {}}


def _dtype(rows: datasets.Dataset, column: str) -> str:
    return getattr(rows.features[column], "dtype", "struct")


def _open(source: str, arguments: PretrainArguments) -> Pairs:
    found = expand(source)
    if found and all(name.endswith(".tar") for name in found):
        return TarPairs(found, source, arguments)
    if len(found) > 1 or found != [source]:
        kinds = {Path(name).suffix for name in found}
        if len(kinds) != 1 or not kinds <= set(TABLES):
            raise UserError(f"train_data {source}: files must be all .tar or all of one of {', '.join(TABLES)}.")
    return TablePairs(_load_table(source, found, arguments.train_split), source, arguments)


def expand(source: str) -> list[str]:
    """Files that a source names: `{000..123}` and `{a,b}` expanded, `*` matched, a folder of tars listed.

    Raises:
        UserError: a pattern, or a name out of it, that matches no file.
    """
    if source.startswith("hf://"):
        from huggingface_hub import snapshot_download

        kind, owner, name, *path = source.removeprefix("hf://").split("/")
        if kind != "datasets" or not path:
            raise UserError(f"train_data {source}: write hf://datasets/OWNER/NAME/PATTERN.")
        try:
            patterns = _expand_braces("/".join(path))
            folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns)
        except Exception as error:  # the client raises many kinds
            raise UserError(f"train_data {source} cannot be had: {str(error).strip().splitlines()[0]}") from None
        return [file for pattern in patterns for file in sorted(glob.glob(os.path.join(folder, pattern)))]
    if os.path.isdir(source):
        return sorted(glob.glob(os.path.join(glob.escape(source), "*.tar"))) or [source]
    names = _expand_braces(source)
    found = [match for name in names for match in (sorted(glob.glob(name)) if "*" in name else [name])]
    if names != [source] or "*" in source:
        missing = [name for name in found if not os.path.isfile(name)] or ([] if found else [source])
        if missing:
            raise UserError(f"train_data {source}: there is no {missing[0]} ({len(missing)} missing in all).")
    return found


def _expand_braces(pattern: str) -> list[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        width = len(span[1])
        values = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = group[1].split(",")
    before, after = pattern[: group.start()], pattern[group.end() :]
    return [name for value in values for name in _expand_braces(before + value + after)]


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


# -- the index of tars -------------------------------------------------------------------------------------------------


def _read_index(shards: list[str]) -> tuple[np.ndarray, list[int], dict[str, str]]:
    """(where pairs lie, pairs a shard, {shard: damage}); made once for files of these names, sizes and times."""
    states = []
    for shard in shards:
        try:
            status = os.stat(shard)
        except OSError as error:
            raise UserError(f"train_data: {shard} cannot be read: {error.strerror}.") from None
        states.append([os.path.abspath(shard), status.st_size, status.st_mtime_ns])
    name = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    cache = Path(HF_HOME) / "amorlip" / name
    if not (cache.with_suffix(".json").is_file() and cache.with_suffix(".npy").is_file()):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            scanned = list(pool.map(_scan, shards))
        about = {
            "sizes": [len(members) for members, _ in scanned],
            "damage": {shard: damage for shard, (_, damage) in zip(shards, scanned, strict=True) if damage},
        }
        for suffix, write in (
            (".npy", lambda file: np.save(file, np.concatenate([members for members, _ in scanned]))),
            (".json", lambda file: file.write(json.dumps(about).encode())),
        ):
            aside = cache.with_suffix(f".{os.getpid()}")
            with aside.open("wb") as file:
                write(file)
            aside.replace(cache.with_suffix(suffix))
    about = json.loads(cache.with_suffix(".json").read_text())
    index = np.load(cache.with_suffix(".npy"), mmap_mode="r") if any(about["sizes"]) else np.empty(0, MEMBERS)
    return index, about["sizes"], about["damage"]


def _scan(shard: str) -> tuple[np.ndarray, str | None]:
    """(where a tar's whole pairs lie, what is wrong with it)."""
    size, pairs, key, damage = os.path.getsize(shard), [], None, None
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isfile() or member.offset_data + member.size > size:
                    continue
                if (folder, stem) != key:
                    key = (folder, stem)
                    pairs.append({})
                pairs[-1][extension.lower()] = (member.offset_data, member.size)
                tar.members = []  # or the reader would keep all of them
            ended = tar.offset + 512 <= size
        damage = None if ended else "cut off: it has no end-of-archive mark"
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = f"damaged: {error}"
    rows = []
    for members in pairs:
        image = next((members[name] for name in IMAGES if name in members), None)
        text = next((members[name] for name in TEXTS if name in members), (0, -1))
        described = members.get("json", (0, -1))
        if image is not None:  # one without caption is kept, to be listed
            rows.append((*image, *text, *described))
    return np.array(rows, MEMBERS), damage
