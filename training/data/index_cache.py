"""The indices of many tars: read from the cache, made once per node where they are missing, opened when needed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from training.data.shards import LocalShards, Shards
from training.data.tar_index import (
    IndexDamageError,
    IndexFile,
    PairPlaces,
    ShardIndex,
    Summary,
    read_summary,
    scan_shard,
    write_index,
)
from training.data.tar_pairs import IMAGE_EXTENSIONS


MAX_OPEN_FILES = 64
NUM_DOWNLOADS = 8
POOL_BYTES = 2**28  # less than this is scanned sooner than processes start


class IndexCache:
    """Indices of shards.

    In a data loader's worker, an index is opened when the first of its pairs is read, so that workers receive the names
    of shards and nothing per pair.

    Args:
        shards: the tars.

    Attributes:
        summaries: counts and damage of each shard; empty in a worker.
        note: why the cache could not be written; None if it could.

    Raises:
        ShardError: a shard cannot be read.
    """

    def __init__(self, shards: Shards):
        self.shards = shards
        self.paths = [cache_folder() / index_name(shards.identity(i)) for i in range(len(shards))]
        self.note: str | None = None
        self._in_memory: dict[int, ShardIndex] = {}
        self._files: dict[int, IndexFile] = {}  # those opened last
        summaries = [read_summary(path) for path in self.paths]
        if None in summaries:
            with self._lock():
                summaries = self._make_missing(summaries)
        self.summaries: list[Summary] = [summary for summary in summaries if summary is not None]

    def places(self, shard: int, position: int) -> PairPlaces:
        """Return where the members of a pair lie."""
        try:
            return self._open(shard).places(position)
        except IndexDamageError:
            return self._make_again(shard).places(position)

    def key(self, shard: int, position: int) -> str:
        """Return the key of a pair."""
        try:
            return self._open(shard).key(position)
        except IndexDamageError:
            return self._make_again(shard).key(position)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "summaries": []}

    def _open(self, shard: int) -> ShardIndex:
        if shard in self._in_memory:
            return self._in_memory[shard]
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            try:
                self._files[shard] = IndexFile(self.paths[shard])
            except (OSError, IndexDamageError):
                return self._make_again(shard)
        return self._files[shard]

    def _make_missing(self, summaries: list[Summary | None]) -> list[Summary | None]:
        """Scan the shards whose index is missing, in several processes when they are large, and write their indices."""
        # Another process may have made them while this one waited for the lock.
        summaries = [summary or read_summary(path) for summary, path in zip(summaries, self.paths, strict=True)]
        missing = [i for i, summary in enumerate(summaries) if summary is None]
        with contextlib.ExitStack() as stack:
            for i, index in zip(missing, self._scan(missing, stack), strict=True):
                summaries[i] = index.summary
                self._keep(i, index)
        return summaries

    def _scan(self, missing: list[int], stack: contextlib.ExitStack) -> Iterator[ShardIndex]:
        """Return an iterator over indices of shards, made by several threads or processes where that is faster."""
        num_workers = min(len(missing), len(os.sched_getaffinity(0)))
        if self.shards.is_remote:
            threads = stack.enter_context(ThreadPoolExecutor(NUM_DOWNLOADS))
            return threads.map(scan_file, [self.shards] * len(missing), missing)
        if num_workers > 1 and sum(self.shards.states[i][0] for i in missing) > POOL_BYTES:
            pool = stack.enter_context(ProcessPoolExecutor(num_workers))
            return pool.map(scan_path, [self.shards.names[i] for i in missing])
        return (scan_file(self.shards, i) for i in missing)

    def _keep(self, shard: int, index: ShardIndex) -> None:
        """Write an index to the cache, or keep it in memory if the cache cannot be written."""
        if self.note is None:
            try:
                self.paths[shard].parent.mkdir(parents=True, exist_ok=True)
                write_index(self.paths[shard], index)
                return
            except OSError as error:
                self.note = f"{self.paths[shard].parent} cannot be written ({error.strerror}): indices stay in memory"
        self._in_memory[shard] = index

    def _make_again(self, shard: int) -> ShardIndex:
        """Return the index of a shard whose index file was damaged or removed after the start.

        Raises:
            ShardError: the shard is not what it was at the start.
        """
        index = scan_file(self.shards, shard)
        if file := self._files.pop(shard, None):
            file.close()
        try:
            write_index(self.paths[shard], index)
        except OSError:
            self._in_memory[shard] = index
        return index

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one process of a node make the indices while the others wait."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # without a lock each process makes its own
                cache_folder().mkdir(parents=True, exist_ok=True)
                descriptor = os.open(cache_folder(), os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield


def cache_folder() -> Path:
    """Return the folder of index files."""
    return Path(HF_HOME) / "amorlip"


def index_name(identity: str) -> str:
    """Return the name of the index file of a shard, another one where other kinds of images can be decoded."""
    text = f"{identity}\0{','.join(IMAGE_EXTENSIONS)}"
    return f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.idx"


def scan_file(shards: Shards, shard: int) -> ShardIndex:
    """Return the index of a shard."""
    file = shards.open(shard)
    try:
        return scan_shard(file)
    finally:
        file.close()


def scan_path(path: str) -> ShardIndex:
    """Return the index of a tar file."""
    return scan_file(LocalShards([path]), 0)
