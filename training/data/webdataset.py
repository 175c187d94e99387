"""Image-text pairs of WebDataset tars, with random access.

One pass over the headers of a tar finds where its members lie; the result is cached. After that, pairs of tars are
numbered like the rows of a table: epochs are exact, a run resumes at any pair, and the number and sizes of shards do
not matter to processes and workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from huggingface_hub.constants import HF_HOME

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.pairs import Pairs


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "text", "caption", "cls")
MEMBER_DTYPE = np.dtype([(f"{kind}{what}", "<i8") for kind in ("image", "text", "json") for what in ("", "_size")])
"""Offset and size in bytes of a pair's members; a size of -1 marks a member that the pair lacks."""
MAX_OPEN_FILES = 64


class TarPairs(Pairs):
    """Members of tars that share a name: an image, and a caption as text or in json.

    Args:
        shards: the tars.
        source: the entry of `train_data` that names them.
        config: names of columns.

    Raises:
        UserError: a tar cannot be read, or there are no pairs.
    """

    def __init__(self, shards: list[str], source: str, config: DataConfig):
        self.source, self.shards = source, shards
        index = read_index(shards)
        self.members, self.shard_sizes, self.damage = index.members, index.shard_sizes, index.damage
        if len(self.members) == 0:
            reasons = "; ".join(f"{shard}: {reason}" for shard, reason in self.damage.items())
            raise UserError(f"train_data {source} has no pairs of an image and a text or json. {reasons}".strip())
        self.ends = np.cumsum(self.shard_sizes)
        self.image_column, self.caption_column = config.image_column, config.caption_column
        columns = {config.caption_column, config.alternative_captions_column, config.keywords_column}
        columns |= {config.group_column, *config.further_caption_columns}
        self.needs_json = bool(columns - {"caption", None})
        self.files: dict[int, int] = {}  # shard -> file descriptor, of the shards opened last

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, members = self._shard(index), self.members[index]
        row: dict[str, Any] = {}
        if members["json_size"] >= 0 and (self.needs_json or members["text_size"] < 0):
            row = json.loads(self._read(shard, members, "json"))
            if not isinstance(row, dict):
                raise ValueError("its json is not an object")
        if members["text_size"] >= 0:
            row["caption"] = self._read(shard, members, "text").decode("utf-8")
        row[self.image_column] = self._read(shard, members, "image")
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # a worker opens its own

    def describe(self, index: int) -> tuple[str, str]:
        shard = self._shard(index)
        # A member's header is the 512 bytes before its content; it starts with the name.
        header = os.pread(self._open(shard), 512, int(self.members[index]["image"]) - 512)
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        return name.rpartition(".")[0] or name, self.shards[shard]

    def captions(self) -> Iterator[str]:
        for i in range(len(self)):
            try:
                caption = self[i].get(self.caption_column)
            except (ValueError, OSError):
                continue  # training lists it when it reaches this pair
            if isinstance(caption, str):
                yield caption

    def column(self, name: str) -> list[Any]:
        return [self[i].get(name) for i in range(len(self))]

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def _open(self, shard: int) -> int:
        if shard not in self.files:
            if len(self.files) >= MAX_OPEN_FILES:
                os.close(self.files.pop(next(iter(self.files))))
            self.files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self.files[shard]

    def _read(self, shard: int, members: np.void, kind: str) -> bytes:
        content = os.pread(self._open(shard), int(members[f"{kind}_size"]), int(members[kind]))
        if len(content) != members[f"{kind}_size"]:
            raise OSError(f"{self.shards[shard]} has become shorter")
        return content


@dataclass
class TarIndex:
    """Where the pairs of shards lie.

    Attributes:
        members: offsets and sizes, `MEMBER_DTYPE` [pairs].
        shard_sizes: number of pairs in each shard.
        damage: what is wrong with a shard, by file name.
    """

    members: np.ndarray
    shard_sizes: list[int]
    damage: dict[str, str]


def read_index(shards: list[str]) -> TarIndex:
    """Return the index of shards, which is made once for files of these names, sizes and modification times.

    Raises:
        UserError: a shard cannot be read.
    """
    states = []
    for shard in shards:
        try:
            status = os.stat(shard)
        except OSError as error:
            raise UserError(f"train_data: {shard} cannot be read: {error.strerror}.") from None
        states.append([os.path.abspath(shard), status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    cache = Path(HF_HOME) / "amorlip" / digest
    if not (cache.with_suffix(".json").is_file() and cache.with_suffix(".npy").is_file()):
        _write_index(cache, shards)
    about = json.loads(cache.with_suffix(".json").read_text())
    members = np.load(cache.with_suffix(".npy"), mmap_mode="r") if any(about["sizes"]) else np.empty(0, MEMBER_DTYPE)
    return TarIndex(members, about["sizes"], about["damage"])


def _write_index(cache: Path, shards: list[str]) -> None:
    """Scan the shards and write their index as `cache`.npy and `cache`.json."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
        scans = list(pool.map(scan_tar, shards))
    members = np.concatenate([members for members, _ in scans])
    about = {
        "sizes": [len(members) for members, _ in scans],
        "damage": {shard: damage for shard, (_, damage) in zip(shards, scans, strict=True) if damage},
    }
    _write_atomically(cache.with_suffix(".npy"), lambda file: np.save(file, members))
    _write_atomically(cache.with_suffix(".json"), lambda file: file.write(json.dumps(about).encode()))


def _write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)


def scan_tar(shard: str) -> tuple[np.ndarray, str | None]:
    """Return the members of a tar's complete pairs (`MEMBER_DTYPE` [pairs]) and what is wrong with the tar, if any."""
    size, damage = os.path.getsize(shard), None
    pairs: list[dict[str, tuple[int, int]]] = []  # extension -> offset and size
    last_key = None
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isfile() or member.offset_data + member.size > size:
                    continue
                if (folder, stem) != last_key:
                    last_key = (folder, stem)
                    pairs.append({})
                pairs[-1][extension.lower()] = (member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # the reader would keep every member
            if tar.offset + 512 > size:
                damage = "cut off: it has no end-of-archive mark"
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = f"damaged: {error}"
    rows = [_member_row(members) for members in pairs]
    return np.array([row for row in rows if row is not None], MEMBER_DTYPE), damage


def _member_row(members: dict[str, tuple[int, int]]) -> tuple[int, ...] | None:
    """Return offsets and sizes of a pair's image, text and json; None if there is no image.

    A pair without a caption is kept, so that training lists it.
    """
    image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
    text = next((members[name] for name in TEXT_EXTENSIONS if name in members), (0, -1))
    return None if image is None else (*image, *text, *members.get("json", (0, -1)))
