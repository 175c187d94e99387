"""Sources of image-text pairs, each a sequence with random access: tables through `datasets`, and WebDataset tars.

A tar is read where its members lie, after one pass over their headers that is kept in a cache. So pairs of tars have
numbers like rows of a table: epochs are exact, a run goes on at any of them, and neither the number of shards nor their
sizes matter to processes and workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.pairs import Pairs


IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "text", "caption", "cls")
MEMBERS = np.dtype([(f"{kind}{what}", "<i8") for kind in ("image", "text", "json") for what in ("", "_size")])
"""Where a pair's members lie in their tar, in bytes; a size of -1 says that there is none."""


class TarPairs(Pairs):
    """Members of WebDataset tars that share a name: an image, and its caption as txt or in json."""

    def __init__(self, shards: list[str], source: str, arguments: PretrainConfig):
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

    def describe(self, index: int) -> tuple[str, str]:
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
