"""The index of a tar: where the members of its pairs lie, in one memory-mapped file per tar.

Members of tars begin at multiples of 512 bytes, so a pair takes 24 bytes: the block and the size of its image, text and
json. The keys follow, for messages. An index file is named by the path, size and modification time of its tar, written
atomically, and made again when its content does not match its checksum.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from training.data.tar import BLOCK, ByteSource, Damage, TarMember, TarReader
from training.data.tar_pairs import Part, group_members


MAGIC = b"AMORLIP\x01"
PREFIX = struct.Struct("<8sII")  # magic, bytes of the summary, checksum of the summary
MEMBERS = ("image", "text", "json")
PAIR_DTYPE = np.dtype([(f"{member}_{what}", "<u4") for member in MEMBERS for what in ("block", "size")])
"""Block of 512 bytes where a member begins, and its size in bytes; block 0 marks a member that the pair lacks."""
MAX_SIZE = 2**32 - 1
MAX_DAMAGE_LISTED = 100


@dataclass
class Summary:
    """Counts and damage of a tar, stored at the start of its index file.

    Attributes:
        num_pairs: number of pairs.
        key_bytes: length of all keys together.
        checksum: CRC-32 of pairs and keys.
        ignored: number of members that are no part of a pair, by cause.
        repeated_keys: number of keys that occur more than once.
        damage: what could not be read.
        num_damaged: number of damaged places, of which `damage` lists the first ones.
    """

    num_pairs: int = 0
    key_bytes: int = 0
    checksum: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    repeated_keys: int = 0
    damage: list[str] = field(default_factory=list)
    num_damaged: int = 0


@dataclass
class ShardIndex:
    """The pairs of one tar.

    Attributes:
        summary: counts and damage.
        pairs: places of members, `PAIR_DTYPE` [num_pairs].
        key_ends: end of each key in `keys`, uint32 [num_pairs].
        keys: the keys one after the other, UTF-8.
    """

    summary: Summary
    pairs: np.ndarray
    key_ends: np.ndarray
    keys: bytes | memoryview

    def key(self, position: int) -> str:
        """Return the key of a pair."""
        start = int(self.key_ends[position - 1]) if position else 0
        return bytes(self.keys[start : int(self.key_ends[position])]).decode("utf-8", "replace")

    def member(self, position: int, name: str) -> tuple[int, int] | None:
        """Return offset and size of a pair's "image", "text" or "json"; None if the pair lacks it."""
        row = self.pairs[position]
        block = int(row[f"{name}_block"])
        return (block * BLOCK, int(row[f"{name}_size"])) if block else None


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
        rows.append(tuple(number for part in parts for number in _place(part)))
        keys.append(pair.key.encode("utf-8", "surrogateescape"))
    ends = np.cumsum([len(key) for key in keys], dtype="<u4")
    index = ShardIndex(Summary(), np.array(rows, PAIR_DTYPE), ends, b"".join(keys))
    index.summary = Summary(
        num_pairs=len(rows),
        key_bytes=len(index.keys),
        checksum=zlib.crc32(_body(index)),
        ignored=dict(sorted((+contents.ignored).items())),
        repeated_keys=contents.repeated_keys,
        damage=[str(place) for place in reader.damage[:MAX_DAMAGE_LISTED]],
        num_damaged=len(reader.damage),
    )
    return index


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(PREFIX.pack(MAGIC, len(summary), zlib.crc32(summary)) + summary)
            file.write(_body(index))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_summary(path: Path) -> Summary | None:
    """Return the summary of an index file; None if the file is missing, cut or damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            summary, body = _parse_summary(start if len(start) < 4096 else start + file.read(2**24))
            expected = body + summary.num_pairs * (PAIR_DTYPE.itemsize + 4) + summary.key_bytes
            return summary if os.fstat(file.fileno()).st_size == expected else None
    except (OSError, ValueError, TypeError, struct.error):
        return None


def map_index(path: Path) -> ShardIndex | None:
    """Return a memory-mapped index; None if the file is missing or does not match its checksums."""
    summary = read_summary(path)
    if summary is None or summary.num_pairs == 0:
        return None
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    keys_start = len(content) - summary.key_bytes
    ends_start = keys_start - 4 * summary.num_pairs
    pairs_start = ends_start - PAIR_DTYPE.itemsize * summary.num_pairs
    if zlib.crc32(content[pairs_start:].data) != summary.checksum:
        return None
    pairs = content[pairs_start:ends_start].view(PAIR_DTYPE)
    return ShardIndex(summary, pairs, content[ends_start:keys_start].view("<u4"), content[keys_start:].data)


def _parse_summary(start: bytes) -> tuple[Summary, int]:
    """Return the summary of an index file, and where its pairs begin; raise ValueError if it is damaged."""
    magic, length, checksum = PREFIX.unpack_from(start)
    summary = start[PREFIX.size : PREFIX.size + length]
    if magic != MAGIC or zlib.crc32(summary) != checksum:
        raise ValueError("no index file, or a damaged one")
    return Summary(**json.loads(summary)), PREFIX.size + length


def _body(index: ShardIndex) -> bytes:
    return index.pairs.tobytes() + index.key_ends.tobytes() + bytes(index.keys)
