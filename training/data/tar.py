"""Read the headers of tar archives, so that every byte is a member, padding or reported damage.

`tarfile` stops at the first header that it cannot read and says nothing. `TarReader` records the damage, continues at
the next block with a valid header checksum, and never extracts anything. It reads the ustar, GNU, PAX and V7 formats
and archives that are appended to one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


BLOCK = 512
WINDOW = 4096  # bytes read at a header: small members follow it closely
SCAN_BYTES = 2**20
MAX_EXTENDED_HEADER = 2**24

LINK_TYPES = b"12"
EXTENDED_TYPES = b"xXgLK"
TYPES_WITHOUT_CONTENT = b"123456"
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LFS_POINTER = b"version https://git-lfs"
OCTAL_CHECKSUM = re.compile(rb"[ 0]*[0-7]+[ \0]+")


class ByteSource(Protocol):
    """Bytes with random access."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the end."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of an archive.

    Attributes:
        name: path inside the archive; bytes that are not UTF-8 are escaped as surrogates.
        type: the type flag, with "0" for regular files, "1" for hard links, "2" for symbolic links, "5" for folders and
            "S" for sparse files of any format.
        offset: first byte of the content.
        size: bytes of content.
        target: what a link points to.
    """

    name: str
    type: str
    offset: int
    size: int
    target: str = ""


@dataclass(frozen=True)
class Damage:
    """A range of bytes that could not be read as members, and why."""

    offset: int
    length: int
    reason: str

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.offset}" + (f", {self.length} bytes skipped" if self.length else "")


class HeaderError(ValueError):
    """A block that is not a valid header."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header block that matter for reading."""

    name: bytes
    type: str
    size: int
    target: bytes
    block: bytes


def parse_header(block: bytes) -> Header:
    """Return the fields of a header block.

    Raises:
        HeaderError: the checksum or the size is wrong.
    """
    difference = sum(block) - sum(block[148:156]) + 8 * ord(" ") - parse_number(block[148:156])
    # Some old writers added signed bytes.
    if difference and difference != 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise HeaderError("damaged header: its checksum is wrong")
    name, magic = _cut(block[:100]), block[257:263]
    if magic == b"ustar\0" and block[345]:  # other formats keep other fields here
        prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
        name = _cut(prefix) + b"/" + name
    type_flag = block[156:157].decode("latin-1")
    if type_flag in "\07":
        type_flag = "5" if type_flag == "\0" and name.endswith(b"/") else "0"
    return Header(name, type_flag, parse_number(block[124:136]), _cut(block[157:257]), block)


def parse_number(field: bytes) -> int:
    """Return a number in octal digits or, when the first bit is set, in binary (GNU's base-256).

    Raises:
        HeaderError: the field holds neither, or a negative number.
    """
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise HeaderError("damaged header: a number is negative")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = _cut(field).strip() or b"0"
    if digits.strip(b"01234567"):
        raise HeaderError("damaged header: a number is not octal")
    return int(digits, 8)


def parse_pax(content: bytes) -> dict[str, str]:
    """Return the records `LENGTH KEY=VALUE\\n` of a PAX header.

    Raises:
        HeaderError: a record is malformed.
    """
    records, position = {}, 0
    while position < len(content) and content[position]:
        match = re.compile(rb"(\d{1,20}) ([^=]+)=").match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            raise HeaderError("a PAX header is damaged")
        records[_decode(match[2])] = _decode(content[match.end() : end - 1])
        position = end
    return records


class TarReader:
    """Iterate over the members of an archive, with `damage` filled on the way.

    Args:
        source: the archive's bytes.
    """

    def __init__(self, source: ByteSource):
        self.source, self.size = source, source.size
        self.damage: list[Damage] = []
        self._window, self._window_start = b"", 0
        self._globals: dict[str, str] = {}  # PAX records for all members that follow
        self._records: dict[str, str] = {}  # PAX records and GNU long names for the next member
        self._name_is_lost = False
        self._has_end = False

    def __iter__(self) -> Iterator[TarMember]:
        position = self._skip_foreign()
        while position + BLOCK <= self.size:
            block = self._read(position, BLOCK)
            if not any(block):
                self._has_end = True
                position += BLOCK
                continue
            try:
                header = parse_header(block)
                member, next_position = self._interpret(header, position)
            except HeaderError as error:
                position = self._resynchronize(position, str(error))
                continue
            self._has_end = False
            if member is not None:
                yield member
            position = next_position
        if position < self.size and any(self._read(position, self.size - position)):
            self.damage.append(Damage(position, self.size - position, "cut off inside a header"))
        elif not self._has_end and not (self.damage and self.damage[-1].end == self.size):
            self.damage.append(Damage(self.size, 0, "cut off: there is no end-of-archive mark"))

    def _skip_foreign(self) -> int:
        start = self._read(0, min(len(LFS_POINTER), self.size))
        if start == LFS_POINTER:
            self.damage.append(Damage(0, self.size, "a Git LFS pointer: fetch the file itself with git lfs pull"))
            return self.size
        for magic, name in COMPRESSIONS.items():
            if start.startswith(magic):
                reason = f"compressed with {name}: decompress it, random access needs plain tars"
                self.damage.append(Damage(0, self.size, reason))
                return self.size
        return 0

    def _interpret(self, header: Header, position: int) -> tuple[TarMember | None, int]:
        """Return the member that a header describes (None for an extended header), and where the next header lies."""
        start = position + BLOCK
        if header.type in EXTENDED_TYPES.decode():
            return None, self._read_extended(header, start)
        records = {**self._globals, **self._records}
        name_is_lost = self._name_is_lost
        self._records, self._name_is_lost = {}, False
        name = records.get("GNU.sparse.name", records.get("path", _decode(header.name)))
        is_sparse = header.type == "S" or any(key.startswith("GNU.sparse.") for key in records)
        if header.type == "S":
            start = self._skip_sparse_maps(header, start)
        size = _parse_decimal(records["size"]) if "size" in records else header.size
        if header.type in TYPES_WITHOUT_CONTENT.decode():
            size = 0
        if start + size > self.size:
            raise HeaderError(f"cut off inside {printable(name)}")
        end = start + -(-size // BLOCK) * BLOCK
        if name_is_lost:
            self.damage.append(Damage(position, end - position, "the long name of a member is lost"))
            return None, end
        target = records.get("linkpath", _decode(header.target))
        return TarMember(name, "S" if is_sparse else header.type, start, size, target), end

    def _read_extended(self, header: Header, start: int) -> int:
        """Remember the records of an extended header for what follows it; return where that begins."""
        if header.size > MAX_EXTENDED_HEADER or start + header.size > self.size:
            raise HeaderError("cut off inside an extended header")
        content = self._read(start, header.size)
        end = start + -(-header.size // BLOCK) * BLOCK
        if header.type == "L":
            self._records["path"] = _decode(_cut(content))
        elif header.type == "K":
            self._records["linkpath"] = _decode(_cut(content))
        else:
            try:
                records = parse_pax(content)
                _parse_decimal(records.get("size", "0"))
            except HeaderError as error:
                self.damage.append(Damage(start, end - start, str(error)))
                self._name_is_lost = True
                return end
            (self._globals if header.type == "g" else self._records).update(records)
        return end

    def _skip_sparse_maps(self, header: Header, start: int) -> int:
        """Return where the content of an old GNU sparse member begins, after its further maps."""
        is_extended = header.block[482]
        while is_extended and start + BLOCK <= self.size:
            is_extended = self._read(start, BLOCK)[504]
            start += BLOCK
        return start

    def _resynchronize(self, position: int, reason: str) -> int:
        """Record damage from a position to the next valid header, and return where that lies."""
        lost = self._read(position, BLOCK)
        self._records = {}
        # The name of the next member lay in here if this was an extended header.
        self._name_is_lost = lost[156:157] in EXTENDED_TYPES or b"PaxHeader" in lost or b"@LongLink" in lost
        start = position + BLOCK
        end = self._find_header(start)
        self.damage.append(Damage(position, end - position, reason))
        return end

    def _find_header(self, start: int) -> int:
        """Return where the next valid header begins; the end of the archive if there is none."""
        while start + BLOCK <= self.size:
            chunk = self.source.read(start, SCAN_BYTES)
            if len(chunk) < BLOCK:
                break
            for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if chunk[i + 257 : i + 262] != b"ustar" and not OCTAL_CHECKSUM.fullmatch(chunk[i + 148 : i + 156]):
                    continue
                try:
                    parse_header(chunk[i : i + BLOCK])
                except HeaderError:
                    continue
                return start + i
            start += len(chunk) // BLOCK * BLOCK
        return self.size

    def _read(self, offset: int, length: int) -> bytes:
        """Return bytes of the archive, from the last window where possible.

        Raises:
            OSError: the file is shorter than it was.
        """
        first = offset - self._window_start
        if first < 0 or first + length > len(self._window):
            length_read = max(length, min(WINDOW, self.size - offset))
            self._window, self._window_start, first = self.source.read(offset, length_read), offset, 0
        content = self._window[first : first + length]
        if len(content) < min(length, self.size - offset):
            raise OSError("the file became shorter while it was read")
        return content


def printable(name: str) -> str:
    """Return a name with escaped bytes replaced, fit for messages and files."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _cut(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _parse_decimal(text: str) -> int:
    if not re.fullmatch(r"\d{1,19}", text):
        raise HeaderError("a PAX header is damaged: its size is no number")
    return int(text)
