"""Find, read and encode the images that a user names: files, folders, glob patterns and URLs."""

from __future__ import annotations

import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.apps.image_urls import fetch, is_url
from eval.apps.outputs import printable
from eval.samples import describe_image_error
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_images
from modeling_amorlip.images_amorlip import IMAGE_EXTENSIONS, convert_to_rgb, open_image


MAX_IMAGE_PIXELS = 2**28
"""Larger images are skipped: one takes 0.8 GB in memory, more than photographs and scans usually have."""
EXCLUDED_FOLDERS = (".*", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "node_modules")
"""Folders of version control, thumbnails, packages and operating systems, which hold no one's pictures."""

ImageSource = Path | str
"""An image file's path, or a URL."""
Source = TypeVar("Source", bound=ImageSource)


@dataclass
class FolderScan:
    """The images below a folder, sorted, and what was left out and why."""

    images: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    excluded: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """Return what was left out and why, one clause per reason; an empty string when nothing was."""
        clauses = []
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
            clauses.append(f"skipped {_count(self.skipped.total(), 'file')} that the decoder does not read ({kinds})")
        if self.excluded:
            clauses.append(f"left out {_count(len(self.excluded), 'folder')} ({_shorten(self.excluded)})")
        if self.unreadable:
            clauses.append(f"could not read {_count(len(self.unreadable), 'folder')} ({_shorten(self.unreadable)})")
        return "; ".join(clauses)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
    scan = FolderScan()
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
                _add_file(scan, path)
            elif _matches(path, folder, [*EXCLUDED_FOLDERS, *exclude]):
                scan.excluded.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    scan.images.sort()
    return scan


def _add_file(scan: FolderScan, path: Path) -> None:
    suffix = path.suffix.lower()
    if not os.path.isfile(path):
        scan.skipped["broken links or special files"] += 1  # opening a named pipe would wait forever
    elif path.name.startswith("._"):
        scan.skipped["._* (macOS metadata)"] += 1
    elif suffix in IMAGE_EXTENSIONS:
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
        reason = "is not a regular file" if path.exists() else "there is no such file or folder"
        raise UserError(f"{printable(path)}: {reason}.")
    scan = scan_folder(path, exclude)
    if summary := scan.summary():
        print(f"{printable(path)}: {summary}", file=sys.stderr)
    if not scan.images:
        raise UserError(f"{printable(path)} holds no image that the decoder reads.")
    return scan.images


def list_images(names: Sequence[str], exclude: Sequence[str] = ()) -> list[ImageSource]:
    """Return the images that names stand for, each once, in the order given.

    Args:
        names: image files, folders, glob patterns (`**` matches any subfolders) and http or https URLs.

    Raises:
        UserError: a name stands for nothing.
    """
    sources: dict[ImageSource, None] = {}
    for name in names:
        if not name:
            raise UserError("The name of an image or folder is empty.")
        if is_url(name):
            sources[name] = None
            continue
        name = os.path.expanduser(name)
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches and glob.has_magic(name):
            raise UserError(f"{printable(name)}: the pattern matches no file.")
        for match in matches or [name]:
            sources |= dict.fromkeys(find_images(Path(match), exclude))
    return list(sources)


def read_image(source: ImageSource) -> Image.Image:
    """Decode an image file or URL to upright RGB; raises whatever the decoder raises for what is not an image."""
    content = fetch(source) if isinstance(source, str) and is_url(source) else source
    return convert_to_rgb(open_image(content, MAX_IMAGE_PIXELS))


def describe_error(error: Exception) -> str:
    """Return the reason in a decoder's or system's error, on one line and without the file's name."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        error = error.reason if isinstance(error.reason, Exception) else error
    return printable(getattr(error, "strerror", None) or describe_image_error(error))


def encode_files(model: Any, processor: Any, sources: Sequence[Source], batch_size: int = 32) -> dict[Source, Tensor]:
    """Return the unit-norm embedding [d] of each image that can be read; name the others on stderr.

    Two batches of whole images are in memory at a time: for photographs of 12 megapixels, 70 MB per image of a batch.
    """
    decoded: list[Source] = []

    def images() -> Iterator[Image.Image]:
        for source in tqdm(sources, unit="img", leave=False, disable=None):
            try:
                image = read_image(source)
            except Exception as error:  # Pillow raises many kinds
                tqdm.write(f"skipped {printable(source)}: {describe_error(error)}", file=sys.stderr)
                continue
            decoded.append(source)
            yield image

    stream = images()
    if (first := next(stream, None)) is None:
        return {}
    embeds = encode_images(model, processor, itertools.chain([first], stream), batch_size)
    return dict(zip(decoded, embeds, strict=True))
