"""Local copies of remote shards, in a folder of limited size that the processes of a node share."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

from training.data.checksums import Checksum
from training.data.shards import LocalFile, ShardError


Result = TypeVar("Result")

CHUNK_BYTES = 2**23
RETRY_SECONDS = 600.0  # without any progress
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        name: its address.
        size: bytes.
        version: changes with its content.
        checksum: of its content; None if the store gives none.
        read: returns the bytes from a start to an end; may return the whole file.
        current_state: returns size and version as they are now.
    """

    name: str
    size: int
    version: str
    checksum: Checksum | None
    read: Callable[[int, int], bytes]
    current_state: Callable[[], tuple[int, str]]


class ShardCache:
    """Local copies of remote files; those used last stay.

    Args:
        folder: where copies lie.
        limit: bytes that they may take together.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._ignores_uncertain_checksums = False

    def open(self, remote: RemoteFile) -> LocalFile:
        """Open the copy of a file, downloaded first if there is none.

        Raises:
            ShardError: the file cannot be downloaded, or changed since the start.
        """
        path = self.path(remote)
        while True:
            try:
                file = LocalFile(str(path))
            except OSError:
                self.download(remote)
                continue  # the copy may be evicted before it is open
            if file.size != remote.size:  # after a crash of the system
                file.close()
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of use decides about eviction
            return file

    def download(self, remote: RemoteFile) -> None:
        """Make a copy of a file, unless there is one.

        Raises:
            ShardError: see `open`.
        """
        path = self.path(remote)
        partial = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path.with_suffix(".lock")):
                if path.exists():
                    return
                with self._lock(self.folder / "evict.lock"):
                    partial.unlink(missing_ok=True)  # left by a process that was killed
                    self._evict(remote.size)
                    with partial.open("wb") as file:
                        file.truncate(remote.size)  # reserves the room
                try:
                    self._copy(remote, partial)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise ShardError(f"{remote.name} cannot be copied to {self.folder}: {error.strerror or error}") from None

    def path(self, remote: RemoteFile) -> Path:
        """Return where the copy of a file lies."""
        identity = f"{remote.name}\0{remote.size}\0{remote.version}"
        suffix = PurePosixPath(urlsplit(remote.name).path).suffix
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}{suffix}"

    def _copy(self, remote: RemoteFile, partial: Path) -> None:
        """Write the content of a file, again if it does not match its checksum."""
        _check_state(remote)
        digests: set[str] = set()

        def copy_once() -> None:
            digest, expected = _write_content(remote, partial), remote.checksum
            if expected is None or digest is None or digest == expected.digest:
                return
            if not expected.is_certain and (digest in digests or self._ignores_uncertain_checksums):
                self._ignores_uncertain_checksums = True
                return
            digests.add(digest)
            raise OSError(f"it arrived damaged: its {expected.algorithm} is {digest}, in the store {expected.digest}")

        retry(remote.name, copy_once)
        _check_state(remote)  # the file may have been replaced meanwhile

    def _evict(self, room: int) -> None:
        """Remove the copies used longest ago until there is room."""
        copies = []
        for path in self.folder.glob("*.*"):
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in copies) + room - self.limit
        for _, size, path in sorted(copies):
            if excess <= 0:
                return
            if path.suffix not in (".part", ".lock"):
                path.unlink(missing_ok=True)
                excess -= size

    @staticmethod
    @contextlib.contextmanager
    def _lock(path: Path) -> Iterator[None]:
        """Let one process at a time enter."""
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _write_content(remote: RemoteFile, partial: Path) -> str | None:
    """Write the content of a file, and return its digest as its checksum is computed; None if it has no checksum."""
    digest = hashlib.new(remote.checksum.algorithm, usedforsecurity=False) if remote.checksum else None
    with partial.open("r+b") as file:
        offset = 0
        while offset < remote.size:
            end = min(offset + CHUNK_BYTES, remote.size)
            content = retry(remote.name, functools.partial(_read_range, remote, offset, end))
            file.write(content)
            if digest:
                digest.update(content)
            offset += len(content)
    return digest.hexdigest() if digest else None


def _read_range(remote: RemoteFile, start: int, end: int) -> bytes:
    """Return a part of a file, or all that follows `start` if the server does not know ranges."""
    content = remote.read(start, end)
    if len(content) == remote.size:
        content = content[start:]
    if len(content) not in (end - start, remote.size - start):
        raise OSError(f"{len(content)} of {end - start} bytes arrived")
    return content


def retry(name: str, call: Callable[[], Result]) -> Result:
    """Return the result of a call that is repeated after failures, with longer and longer waits.

    Args:
        name: address of the file that the call reads, for the message.
        call: what is called.

    Raises:
        ShardError: the call still fails after `RETRY_SECONDS`.
    """
    deadline, wait = time.monotonic() + RETRY_SECONDS, FIRST_WAIT
    while True:
        try:
            return call()
        except ShardError:
            raise
        except Exception as error:  # clients of stores raise many kinds
            if time.monotonic() + wait > deadline:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ShardError(f"{name} could not be read for {RETRY_SECONDS:.0f} s: {reason}") from None
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def _check_state(remote: RemoteFile) -> None:
    """Raise ShardError if a file is not what it was at the start."""
    if retry(remote.name, remote.current_state) != (remote.size, remote.version):
        raise ShardError(f"{remote.name} was changed since the run began")
