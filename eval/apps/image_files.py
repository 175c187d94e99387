"""Find, read and encode the images that a user names: files, folders, glob patterns and URLs."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.apps.outputs import printable
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_images
from modeling_amorlip.images_amorlip import convert_to_rgb, open_image


MAX_IMAGE_PIXELS = 2**28
"""Larger images are skipped: one takes 0.8 GB in memory, more than photographs and scans usually have."""
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow identifies but decodes only with other programs."""
EXCLUDED_FOLDERS = (".*", "@eaDir", "__MACOSX", "node_modules")
"""Folders of version control, thumbnails and packages, which nobody means by "my pictures"."""


def image_suffixes() -> frozenset[str]:
    """Return the file suffixes of all formats that the image decoder reads, in lower case."""
    formats = Image.registered_extensions()  # loads all plugins, so `Image.OPEN` is complete afterwards
    return frozenset(s for s, name in formats.items() if name in Image.OPEN and name not in UNREADABLE_FORMATS)


@dataclass
class FolderScan:
    """The images below a folder, sorted, and what was left out and why."""

    images: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    excluded: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line per kind of omission; an empty string when nothing was left out."""
        lines = []
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
            lines.append(f"skipped {self.skipped.total()} files that are not images the decoder reads: {kinds}")
        if self.excluded:
            lines.append(f"left out {len(self.excluded)} folders: {_shorten(self.excluded)}")
        if self.unreadable:
            lines.append(f"skipped {len(self.unreadable)} folders that cannot be read: {_shorten(self.unreadable)}")
        return "\n".join(lines)


def _shorten(paths: list[Path], length: int = 5) -> str:
    names = ", ".join(printable(path) for path in paths[:length])
    return names if len(paths) <= length else f"{names} and {len(paths) - length} more"


def scan_folder(folder: Path, exclude: Sequence[str] = ()) -> FolderScan:
    """Find all images in a folder and its subfolders, each folder once.

    Symbolic links to folders are followed after all real folders, so that an image is listed under its real path
    where it has one below `folder`, and a loop of links ends.

    Args:
        exclude: patterns of folders to leave out, in addition to `EXCLUDED_FOLDERS`. A pattern is compared with the
            folder's name, its path below `folder` and its whole path.
    """
    scan, suffixes = FolderScan(), image_suffixes()
    visited: set[tuple[int, int]] = set()
    folders: list[Path] = [folder]
    links: list[Path] = []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            scan.unreadable.append(current)
            continue
        for entry in entries:
            path = current / entry.name
            if not os.path.isdir(path):
                _add_file(scan, path, suffixes)
            elif _matches(path, folder, [*EXCLUDED_FOLDERS, *exclude]):
                scan.excluded.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    scan.images.sort()
    return scan


def _add_file(scan: FolderScan, path: Path, suffixes: frozenset[str]) -> None:
    suffix = path.suffix.lower()
    if not os.path.isfile(path):
        scan.skipped["broken links or special files"] += 1  # opening a named pipe would wait for ever
    elif path.name.startswith("._"):
        scan.skipped["._* (macOS metadata)"] += 1
    elif suffix in suffixes:
        scan.images.append(path)
    else:
        scan.skipped[printable(suffix) or "without suffix"] += 1


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    names = (path.name, path.relative_to(root).as_posix(), path.as_posix())
    return any(fnmatch(name, pattern.rstrip("/")) for pattern in patterns for name in names)


def find_images(path: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """Return an image file itself, or all images in a folder and its subfolders, sorted.

    What a folder holds besides is summed up on stderr.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{printable(path)}: there is no such file or folder.")
    scan = scan_folder(path, exclude)
    if summary := scan.summary():
        print(f"{printable(path)}: {summary}", file=sys.stderr)
    if not scan.images:
        raise UserError(f"{printable(path)} holds no image that can be read.")
    return scan.images


def read_image(path: Path) -> Image.Image:
    """Decode an image file to upright RGB; raises whatever the decoder raises for a file that is not an image."""
    return convert_to_rgb(open_image(str(path), MAX_IMAGE_PIXELS))


def encode_files(model: Any, processor: Any, paths: Sequence[Path], batch_size: int = 32) -> dict[Path, Tensor]:
    """Return the unit-norm embedding [d] of each image that can be read; name the others on stderr.

    Two batches of whole images are in memory at a time: for photographs of 12 megapixels, 70 MB per image of a batch.
    """
    decoded: list[Path] = []

    def images() -> Iterator[Image.Image]:
        for path in tqdm(paths, unit="img", leave=False):
            try:
                image = read_image(path)
            except Exception as error:  # Pillow raises many kinds
                tqdm.write(f"skipped {printable(path)}: {printable(error)}", file=sys.stderr)
                continue
            decoded.append(path)
            yield image

    stream = images()
    if (first := next(stream, None)) is None:
        return {}
    embeds = encode_images(model, processor, itertools.chain([first], stream), batch_size)
    return dict(zip(decoded, embeds, strict=True))


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines without blank ones; raises `UserError` when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)} cannot be read as UTF-8 text: {error}") from None
    return [line.strip() for line in lines if line.strip()]
