"""The index of a tar: where the members of its pairs lie, in one file per tar, of which single pairs are read.

Members of tars begin at multiples of 512 bytes, so a pair takes 24 bytes: the block and the size of its image, text and
json. The keys follow, for messages, and then a checksum of every 4,096 bytes. An index file is named by the path, size
and modification time of its tar, written atomically, and made again when its content does not match a checksum. Reading
a pair takes 4 kB and leaves nothing in memory; maps of the files would grow to the whole index.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from training.data.tar import BLOCK, ByteSource, Damage, TarMember, TarReader
from training.data.tar_pairs import Part, group_members


MAGIC = b"AMORLIP\x03"
PREFIX = struct.Struct("<8sII")  # magic, bytes of the summary, checksum of the summary
PAIR = struct.Struct("<6I")
"""Block of 512 bytes where a member begins and its size in bytes, for each member; block 0 marks a missing one."""
NUMBER = struct.Struct("<I")
CHECKED_BYTES = 4096  # bytes of the body that one checksum covers
MAX_SIZE = 2**32 - 1
MAX_DAMAGE_LISTED = 100
MAX_SUMMARY = 2**24  # bytes


@dataclass
class Summary:
    """Counts and damage of a tar, stored at the start of its index file.

    Attributes:
        num_pairs: number of pairs.
        body_size: bytes of places and keys.
        ignored: number of members that are no part of a pair, by cause.
        repeated_keys: number of keys that occur more than once.
        damage: what could not be read.
        num_damaged: number of damaged places, of which `damage` lists the first ones.
    """

    num_pairs: int = 0
    body_size: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    repeated_keys: int = 0
    damage: list[str] = field(default_factory=list)
    num_damaged: int = 0


class Place(NamedTuple):
    """Where the content of a member lies."""

    offset: int
    size: int


class PairPlaces(NamedTuple):
    """Where the members of a pair lie; None for those that it lacks."""

    image: Place | None
    text: Place | None
    json: Place | None


class PairIndex(Protocol):
    """The pairs of one tar."""

    def places(self, position: int) -> PairPlaces:
        """Return where the members of a pair lie."""

    def key(self, position: int) -> str:
        """Return the key of a pair."""


class IndexDamageError(ValueError):
    """An index file whose content does not match its checksums."""


class ShardIndex:
    """The pairs of one tar, in memory.

    Args:
        summary: counts and damage.
        body: places of members (`PAIR` for each pair), ends of the keys (`NUMBER` for each), and the keys in UTF-8.
    """

    def __init__(self, summary: Summary, body: bytes):
        self.summary, self.body = summary, body

    def places(self, position: int) -> PairPlaces:
        """Return where the members of a pair lie."""
        numbers = PAIR.unpack(self._read(position * PAIR.size, PAIR.size))
        return PairPlaces(
            *(Place(b * BLOCK, s) if b else None for b, s in zip(numbers[::2], numbers[1::2], strict=True))
        )

    def key(self, position: int) -> str:
        """Return the key of a pair."""
        ends = self.summary.num_pairs * PAIR.size
        start = NUMBER.unpack(self._read(ends + (position - 1) * NUMBER.size, NUMBER.size))[0] if position else 0
        (end,) = NUMBER.unpack(self._read(ends + position * NUMBER.size, NUMBER.size))
        keys = ends + self.summary.num_pairs * NUMBER.size
        return self._read(keys + start, end - start).decode("utf-8", "replace")

    def _read(self, offset: int, length: int) -> bytes:
        return self.body[offset : offset + length]


class IndexFile(ShardIndex):
    """The pairs of one tar, read from its index file when they are needed.

    Args:
        path: the index file.

    Raises:
        OSError: it cannot be opened.
        IndexDamageError: it is cut or damaged.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY)
        try:
            summary, self._start = _read_start(self._file)
        except BaseException:
            self.close()
            raise
        super().__init__(summary, b"")
        self._part_number, self._part = -1, b""  # the part that was read last

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _read(self, offset: int, length: int) -> bytes:
        """Return bytes of the body that match their checksums."""
        first, last = offset // CHECKED_BYTES, (offset + length - 1) // CHECKED_BYTES
        content = b"".join(self._read_part(number) for number in range(first, last + 1))
        return content[offset - first * CHECKED_BYTES :][:length]

    def _read_part(self, number: int) -> bytes:
        if number != self._part_number:
            size = self.summary.body_size
            start = number * CHECKED_BYTES
            part = os.pread(self._file, min(CHECKED_BYTES, size - start), self._start + start)
            checksum = os.pread(self._file, NUMBER.size, self._start + size + number * NUMBER.size)
            if NUMBER.pack(zlib.crc32(part)) != checksum:
                raise IndexDamageError("a part of the index file is damaged")
            self._part_number, self._part = number, part
        return self._part


def scan_shard(source: ByteSource) -> ShardIndex:
    """Return the index of a tar from its headers."""
    reader = TarReader(source)
    contents = group_members(_members_until_error(reader))
    rows, keys = [], []
    for pair in contents.pairs:
        parts = (pair.image, pair.text, pair.json)
        if any(part is not None and (part.size > MAX_SIZE or part.offset // BLOCK > MAX_SIZE) for part in parts):
            contents.ignored["members of more than 4 GB"] += 1
            continue
        rows.append(PAIR.pack(*(number for part in parts for number in _place(part))))
        keys.append(pair.key.encode("utf-8", "surrogateescape"))
    ends = np.cumsum([len(key) for key in keys], dtype="<u4")
    body = b"".join([*rows, ends.tobytes(), *keys])
    summary = Summary(
        num_pairs=len(rows),
        body_size=len(body),
        ignored=dict(sorted((+contents.ignored).items())),
        repeated_keys=contents.repeated_keys,
        damage=[str(place) for place in reader.damage[:MAX_DAMAGE_LISTED]],
        num_damaged=len(reader.damage),
    )
    return ShardIndex(summary, body)


def _members_until_error(reader: TarReader) -> Iterator[TarMember]:
    try:
        yield from reader
    except OSError as error:
        reader.damage.append(Damage(reader.size, 0, f"reading stopped: {error.strerror or error}"))


def _place(part: Part | None) -> tuple[int, int]:
    return (part.offset // BLOCK, part.size) if part is not None else (0, 0)


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index file atomically; after a crash of the system, its checksums show what is missing.

    Raises:
        OSError: it cannot be written.
    """
    summary = json.dumps(asdict(index.summary)).encode()
    summary += b" " * (-(PREFIX.size + len(summary)) % 8)
    parts = [index.body[i : i + CHECKED_BYTES] for i in range(0, len(index.body), CHECKED_BYTES)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(PREFIX.pack(MAGIC, len(summary), zlib.crc32(summary)) + summary)
            file.write(index.body)
            file.write(b"".join(NUMBER.pack(zlib.crc32(part)) for part in parts))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_summary(path: Path) -> Summary | None:
    """Return the summary of an index file; None if the file is missing, cut or damaged."""
    try:
        index = IndexFile(path)
    except (OSError, IndexDamageError):
        return None
    index.close()
    return index.summary


def _read_start(file: int) -> tuple[Summary, int]:
    """Return the summary of an open index file, and where its body begins.

    Raises:
        IndexDamageError: the file is cut or damaged.
    """
    start = os.pread(file, CHECKED_BYTES, 0)
    try:
        magic, length, checksum = PREFIX.unpack_from(start)
        summary = start[PREFIX.size : PREFIX.size + length]
        if len(summary) < length <= MAX_SUMMARY:
            summary += os.pread(file, length - len(summary), len(start))
        if magic != MAGIC or zlib.crc32(summary) != checksum:
            raise ValueError("no index file, or a damaged one")
        result = Summary(**json.loads(summary))
    except (ValueError, TypeError, struct.error) as error:
        raise IndexDamageError(str(error)) from None
    body = PREFIX.size + length
    num_parts = -(-result.body_size // CHECKED_BYTES)
    if os.fstat(file).st_size != body + result.body_size + num_parts * NUMBER.size:
        raise IndexDamageError("the index file is cut")
    return result, body
