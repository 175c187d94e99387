"""WebDataset tars: samples whose members share a name up to the first dot. Nothing is ever extracted to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from modeling_amorlip.cli_amorlip import UserError


BLOCK = 512


def read_tar(path: Path, select: Callable[[int], bool] | None = None) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Yield (index, key, {extension: content}) of the samples of a tar.

    Args:
        select: Whether to read the sample with an index; the contents of others are skipped without being read.

    Raises:
        UserError: The tar is truncated or damaged, or two members of a sample have the same extension.
    """
    _check_end_of_archive(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for index, (key, members) in enumerate(_group_by_key(tar, path)):
                if select is None or select(index):
                    yield index, key, {extension: _content(tar, member) for extension, member in members.items()}
            _check_all_read(tar, path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again with --download.") from None


def _check_end_of_archive(path: Path) -> None:
    """Raise `UserError` for a compressed tar, or one without its trailing zeros, which would pass for a shorter one."""
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed with gzip: decompress it with gunzip, or repack it with tar.")
        if file.seek(0, 2) < BLOCK or not (file.seek(-BLOCK, 2) and not any(file.read())):
            raise UserError(f"{path} is cut off (it has no end-of-archive mark); fetch it again with --download.")


def _check_all_read(tar: tarfile.TarFile, path: Path) -> None:
    """Raise `UserError` when reading ended at a damaged header, where `tarfile` stops without an error."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        if any(file.read(BLOCK)):
            raise UserError(
                f"{path} is damaged (the header at byte {tar.offset} is invalid); fetch it again with --download."
            )


def _group_by_key(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield (key, {extension: member}) for each run of members with the same key."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if not member.isreg():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = f"{folder}/{stem}".lstrip("/"), extension.lower()
        if key != current and members and current is not None:
            yield current, members
            members = {}
        if extension in members:
            raise UserError(
                f"{path}: two members of sample {key} are called .{extension}; give each sample its own key."
            )
        current = key
        members[extension] = member
    if members and current is not None:
        yield current, members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""
