"""Several sources of image-text pairs as one sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub.constants import HF_HUB_OFFLINE

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.pairs import Pairs
from training.data.patterns import expand, is_tar
from training.data.records import RecordPairs
from training.data.remote import (
    RemoteShards,
    copy_tables,
    download_repository,
    expand_remote,
    is_remote,
    is_remote_tar,
)
from training.data.shards import LocalShards
from training.data.table_files import TABLE_LOADERS, load_table
from training.data.tables import TablePairs
from training.data.webdataset import TarPairs


def open_pairs(config: DataConfig) -> Mixture:
    """Open every source that `train_data` names; `::` separates them.

    Raises:
        UserError: a source does not exist, cannot be read, holds no pair or lacks a column.
    """
    names = [name for name in config.train_data.split("::") if name]
    weights = config.train_data_weights
    if weights and len(weights) != len(names):
        raise UserError(f"train_data_weights has {len(weights)} values for {len(names)} sources in train_data.")
    return Mixture([open_source(name, config) for name in names])


def open_source(source: str, config: DataConfig) -> Pairs:
    """Open one source: tars, or whatever `datasets` reads.

    Raises:
        UserError: see `open_pairs`.
    """
    if is_remote(source):
        is_repository = source.startswith("hf://")
        if is_remote_tar(source) and not (is_repository and HF_HUB_OFFLINE):
            return TarPairs(RemoteShards(expand_remote(source), config), source, config)
        files = download_repository(source) if is_repository else download_tables(source)
    else:
        files = expand(source)
    if files and all(is_tar(name) for name in files):
        return TarPairs(LocalShards(files), source, config)
    if len(files) > 1 or files != [source]:
        suffixes = {Path(name).suffix.lower() for name in files}
        if len(suffixes) != 1 or not suffixes <= set(TABLE_LOADERS):
            raise UserError(f"train_data {source}: files must be all .tar or all of one of {', '.join(TABLE_LOADERS)}.")
    table = load_table(source, files, config)
    pairs_class = RecordPairs if table.has_records else TablePairs
    return pairs_class(table.rows, source, config, table.folder, table.notes)


def download_tables(source: str) -> list[str]:
    """Copy the tables that an address names to the local disk, and return their local names.

    Raises:
        UserError: it names files of another kind, or they cannot be read.
    """
    addresses = expand_remote(source)
    suffixes = {PurePosixPath(urlsplit(address).path).suffix.lower() for address in addresses}
    if len(suffixes) != 1 or not suffixes <= set(TABLE_LOADERS):
        raise UserError(
            f"train_data {source}: only files that are all .tar or all of one of {', '.join(TABLE_LOADERS)} are read "
            "from there."
        )
    return copy_tables(addresses)


class Mixture:
    """The pairs of several sources, one source after the other.

    Args:
        parts: the sources, in order.
    """

    def __init__(self, parts: Sequence[Pairs]):
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, position = self._locate(index)
        return part[position]

    def describe(self, index: int) -> tuple[str, str]:
        """Return the key of a pair and the file that holds it, for messages."""
        part, position = self._locate(index)
        return part.describe(position)

    def captions(self) -> Iterator[str]:
        """Iterate over all captions that are text."""
        return (caption for part in self.parts for caption in part.captions())

    def column(self, name: str) -> list[Any]:
        """Return the values of a column, one per pair."""
        return [value for part in self.parts for value in part.column(name)]

    def remote_shards(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return the remote shards that hold pairs, as (number of the source, number of the shard), without repeats."""
        positions = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        shards = np.full(len(positions), -1)
        for number in np.unique(numbers):
            part = self.parts[number]
            if isinstance(part, TarPairs) and part.shards.is_remote:
                mask = numbers == number
                shards[mask] = part.locate_shards(positions[mask] - self.starts[number])
        places = zip(numbers.tolist(), shards.tolist(), strict=True)
        return list(dict.fromkeys(place for place in places if place[1] >= 0))

    @property
    def is_remote(self) -> bool:
        """Whether shards of any source are downloaded."""
        return any(isinstance(part, TarPairs) and part.shards.is_remote for part in self.parts)

    def fingerprint(self) -> str:
        """Return a text that is equal on all processes that see the same pairs in the same order."""
        digest = hashlib.sha256()
        for number, part in enumerate(self.parts):
            ends = self.starts[number + 1] - 1, self.starts[number]
            keys = [self.describe(int(index))[0] for index in ends] if len(part) else []
            first_caption = next(iter(part.captions()), None)
            digest.update(repr((part.shard_sizes, keys, first_caption)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def report(self) -> list[str]:
        """Return a line per source on what it holds, and what of it is left out for which reason."""
        return [part.report() for part in self.parts]

    def _locate(self, index: int) -> tuple[Pairs, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])
