"""Image-text pairs of WebDataset tars, with random access.

One pass over the headers of a tar finds where its members lie; the result is cached. After that, pairs of tars are
numbered like the rows of a table: epochs are exact, a run resumes at any pair, and the number and sizes of shards do
not matter to processes and workers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.index_cache import IndexCache
from training.data.pairs import MAX_CAPTION_CHARACTERS, Pairs, check_columns, usable_captions
from training.data.patterns import count_deeper_tars
from training.data.shards import LocalFile, Shards
from training.data.tar_index import Place


MAX_OPEN_FILES = 64
MAX_EXAMPLES = 1000  # pairs whose json is read for the names of columns
MAX_DAMAGE_SHOWN = 3
MAX_TEXT_BYTES = 4 * MAX_CAPTION_CHARACTERS
MAX_JSON_BYTES = 2**24
MAX_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed


class TarPairs(Pairs):
    """Members of tars that share a key: an image, and a caption as text or in json.

    Args:
        shards: the tars.
        source: the entry of `train_data` that names them.
        config: names of columns.

    Raises:
        UserError: a tar cannot be read, there are no pairs, or a column is missing or of another type.
    """

    def __init__(self, shards: Shards, source: str, config: DataConfig):
        self.source, self.shards = source, shards
        self.index = IndexCache(shards)
        summaries = self.index.summaries
        self.shard_sizes = [summary.num_pairs for summary in summaries]
        self.ends = np.cumsum(self.shard_sizes)
        self.damage = {
            shard: _describe_damage(summary.damage, summary.num_damaged)
            for shard, summary in zip(shards.names, summaries, strict=True)
            if summary.num_damaged
        }
        if len(self) == 0:
            raise UserError(f"train_data {source} has no pairs of an image and a caption. {self.report()}")
        self.image_column, self.caption_column = config.image_column, config.caption_column
        columns = {config.caption_column, config.alternative_captions_column, config.keywords_column}
        columns |= {config.group_column, *config.further_caption_columns}
        self.columns = {column for column in columns if column is not None}
        self.needs_json = bool(self.columns - {"caption"})
        self.max_image_bytes = MAX_BYTES_PER_PIXEL * config.max_image_pixels + MAX_JSON_BYTES
        self.files: dict[int, LocalFile] = {}  # the shards opened last
        check_columns(config, source, self._examples())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, position = self._locate(index)
        row = self._read_text(shard, position, self.needs_json)
        row[self.image_column] = self._read(shard, self.index.places(shard, position).image, self.max_image_bytes)
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # a worker opens its own

    def describe(self, index: int) -> tuple[str, str]:
        shard, position = self._locate(index)
        return self.index.key(shard, position), self.shards.names[shard]

    def captions(self) -> Iterator[str]:
        needs_json = self.caption_column != "caption"
        return usable_captions(row.get(self.caption_column) for row in self._text_rows(needs_json))

    def column(self, name: str) -> list[Any]:
        values = (row.get(name) for row in self._text_rows(name != "caption"))
        return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]

    def report(self) -> str:
        ignored: Counter[str] = Counter()
        for summary in self.index.summaries:
            ignored.update(summary.ignored)
        parts = [f"{self.source}: {len(self)} pairs in {_count(len(self.shards), 'shard')}"]
        if ignored:
            parts.append("ignored: " + ", ".join(f"{count} {cause}" for cause, count in ignored.most_common()))
        if repeated := sum(summary.repeated_keys for summary in self.index.summaries):
            parts.append(f"{_count(repeated, 'repeated key')} with separate pairs")
        if self.damage:
            shown = [f"{shard}: {damage}" for shard, damage in list(self.damage.items())[:MAX_DAMAGE_SHOWN]]
            parts.append(f"{_count(len(self.damage), 'damaged shard')}: {'; '.join(shown)}")
        if deeper := count_deeper_tars(self.source):
            parts.append(f"not read: {_count(deeper, 'tar')} in its subfolders")
        if self.index.note:
            parts.append(self.index.note)
        return "; ".join(parts)

    def locate_shards(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of the shard that holds each pair."""
        return np.searchsorted(self.ends, indices, side="right")

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the shard of a pair and its position there."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - int(self.ends[shard - 1]) if shard else index

    def _examples(self) -> dict[str, Any]:
        """Return a value of each column, looked for in pairs that are spread over all shards."""
        examples: dict[str, Any] = {self.image_column: b""}
        step = max(1, len(self) // MAX_EXAMPLES)
        for index in range(0, len(self), step):
            if all(examples.get(column) is not None for column in self.columns):
                break
            for name, value in self._try_read_text(*self._locate(index), self.needs_json).items():
                if examples.get(name) is None:
                    examples[name] = value
        return examples

    def _text_rows(self, needs_json: bool) -> Iterator[dict[str, Any]]:
        """Iterate over the columns of all pairs without their images; empty where they cannot be read."""
        for shard, size in enumerate(self.shard_sizes):
            for position in range(size):
                yield self._try_read_text(shard, position, needs_json)

    def _try_read_text(self, shard: int, position: int, needs_json: bool) -> dict[str, Any]:
        try:
            return self._read_text(shard, position, needs_json)
        except (ValueError, OSError, RecursionError):
            return {}  # training lists it when it reaches this pair

    def _read_text(self, shard: int, position: int, needs_json: bool) -> dict[str, Any]:
        """Return the columns of a pair without its image."""
        places = self.index.places(shard, position)
        row: dict[str, Any] = {}
        if places.json is not None and (needs_json or places.text is None):
            row = json.loads(self._read(shard, places.json, MAX_JSON_BYTES))
            if not isinstance(row, dict):
                raise ValueError("its json is not an object")
        if places.text is not None:
            row["caption"] = self._read(shard, places.text, MAX_TEXT_BYTES).decode("utf-8-sig")
        return row

    def _read(self, shard: int, place: Place | None, max_bytes: int) -> bytes:
        """Return the content of a member.

        Raises:
            ValueError: it is larger than any useful one, and would fill the memory.
            OSError: the file is shorter than it was.
        """
        if place is None:
            raise ValueError("the pair lacks a member")
        if place.size > max_bytes:
            raise ValueError(f"a member has {place.size} bytes, more than {max_bytes}")
        content = self._open(shard).read(place.offset, place.size)
        if len(content) != place.size:
            raise OSError(f"{self.shards.names[shard]} has become shorter")
        return content

    def _open(self, shard: int) -> LocalFile:
        if shard not in self.files:
            if len(self.files) >= MAX_OPEN_FILES:
                self.files.pop(next(iter(self.files))).close()
            self.files[shard] = self.shards.open(shard)
        return self.files[shard]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _describe_damage(damage: list[str], number: int) -> str:
    shown = ", ".join(damage[:MAX_DAMAGE_SHOWN])
    return shown + (f" and {number - MAX_DAMAGE_SHOWN} more places" if number > MAX_DAMAGE_SHOWN else "")
