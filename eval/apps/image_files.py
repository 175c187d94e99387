"""Images and lines of text in a user's files."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_images
from modeling_amorlip.images_amorlip import convert_to_rgb


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(path: Path) -> list[Path]:
    """An image file itself, or all images in a folder and its subfolders, sorted.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder.")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def open_image(path: Path) -> Image.Image:
    """The image in RGB, upright as its camera noted, with transparency laid on white."""
    with Image.open(path) as image:
        return convert_to_rgb(ImageOps.exif_transpose(image))


def encode_files(model, processor, paths: list[Path], batch_size: int = 32) -> dict[Path, Tensor]:
    """Unit-norm embedding [d] of each image that can be read; those that cannot are named on stderr.

    Two batches of whole images are in memory at a time: with photographs of 12 megapixels, 70 MB for each image of one.
    """
    read: list[Path] = []

    def images() -> Iterator[Image.Image]:
        for path in tqdm(paths, unit="img", leave=False):
            try:
                image = open_image(path)
            except Exception as error:  # Pillow raises many kinds
                tqdm.write(f"skipped {path}: {error}", file=sys.stderr)
                continue
            read.append(path)
            yield image

    stream = images()
    if (first := next(stream, None)) is None:
        return {}
    embeds = encode_images(model, processor, itertools.chain([first], stream), batch_size)
    return dict(zip(read, embeds, strict=True))


def read_lines(path: Path) -> list[str]:
    """A text file's lines, without blank ones; raises `UserError` when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return [line.strip() for line in lines if line.strip()]
