"""Shards as files with random access; a shard that changes during a run raises an error."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence

from modeling_amorlip.cli_amorlip import UserError


class ShardError(RuntimeError):
    """A shard that cannot be read any more; the run ends, since no other pairs may replace a whole shard."""

    def __init__(self, message: str):
        # A data loader raises a worker's error again with a traceback around its message.
        super().__init__(message.rpartition("ShardError: ")[2].strip())


class LocalFile:
    """A file with random access.

    Args:
        path: the file.
    """

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        self.size, self.time = status.st_size, status.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the end of the file."""
        content = os.pread(self.descriptor, length, offset)
        while len(content) < length:  # one call reads at most 2 GB
            rest = os.pread(self.descriptor, length - len(content), offset + len(content))
            if not rest:
                break
            content += rest
        return content

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Shards(ABC):
    """The shards of a source.

    Attributes:
        names: paths or addresses.
        states: size in bytes and version of each shard at the start; the version changes with the content.
        is_remote: whether opening a shard may download it.
    """

    names: Sequence[str]
    states: list[tuple[int, str]]
    is_remote = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, shard: int) -> LocalFile:
        """Open a shard.

        Raises:
            ShardError: it changed since the start, or cannot be read.
        """

    def identity(self, shard: int) -> str:
        """Return a text that names a shard and its content."""
        return "\0".join([self.names[shard], *map(str, self.states[shard])])


class LocalShards(Shards):
    """Shards in the file system.

    Args:
        paths: the files.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[str]):
        self.names = [os.path.abspath(path) for path in paths]
        self.states = []
        for path in paths:
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"train_data: {path} cannot be read: {error.strerror}.") from None
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise UserError(f"train_data: {path} is no file.")
            self.states.append((status.st_size, str(status.st_mtime_ns)))

    def open(self, shard: int) -> LocalFile:
        try:
            file = LocalFile(self.names[shard])
        except OSError as error:
            raise ShardError(f"{self.names[shard]} cannot be read: {error.strerror}") from None
        # The offsets in the index are valid only for the file that was scanned.
        if (file.size, str(file.time)) != self.states[shard]:
            file.close()
            raise ShardError(f"{self.names[shard]} was changed since the run began")
        return file
