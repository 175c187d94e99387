"""The forms in which tables hold images."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any

import datasets

from modeling_amorlip.cli_amorlip import UserError


URL = re.compile(r"(https?|ftp|s3|gs|hf)://")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
MAX_PATH = 4096
MAX_CHECKED = 20


def resolve_image(value: Any, folder: Path) -> bytes | str:
    """Return an image as encoded bytes or as a path.

    Args:
        value: bytes, a path, base64 text, a list of byte values, or a mapping with `bytes` or `path`.
        folder: where relative paths begin; the working folder comes second.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, int) and 0 <= item < 256 for item in value):
            raise ValueError("the image is a list, and not one of byte values")
        value = bytes(value)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"the image is {str(value)[:50]!r}; it must be a path or encoded bytes")
    if (content := _decode_base64(value, folder)) is not None:
        return content
    beside = folder / value
    path = str(beside) if os.path.isabs(value) or beside.exists() or not os.path.exists(value) else value
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"the image {path} is a folder, a pipe or a device")  # reading a pipe would wait for ever
    return path


def check_image_values(rows: datasets.Dataset, column: str, source: str, folder: Path) -> None:
    """Check the first rows for images in a form that cannot be read.

    Raises:
        UserError: images are URLs, lists of images, numbers, or structs without `bytes` and `path`, or none of the
            files that they name is there.
    """
    missing, where = [], f"image_column {column!r} of {source}"
    for row in range(min(MAX_CHECKED, len(rows))):
        value = rows[row][column]
        if isinstance(value, dict):
            if not {"bytes", "path"} & value.keys():
                raise UserError(f"{where} holds structs of {', '.join(value)}; they must have `bytes` or `path`.")
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and URL.match(value):
            raise UserError(
                f"{where} holds URLs ({value[:80]}): download the images first, for example by img2dataset."
            )
        if isinstance(value, list) and value and not isinstance(value[0], int):
            raise UserError(f"{where} holds lists of {type(value[0]).__name__}s; it must hold one image per row.")
        if not isinstance(value, (str, bytes, list, type(None))):
            raise UserError(f"{where} holds {type(value).__name__}s; it must hold paths or encoded images.")
        if isinstance(value, str) and value and not _is_readable(value, folder):
            missing.append(value)
    if len(missing) == min(MAX_CHECKED, len(rows)):
        raise UserError(
            f"{where} names files that are not there ({missing[0]} in {folder}): move them there, or name full paths."
        )


def _is_readable(value: str, folder: Path) -> bool:
    try:
        image = resolve_image(value, folder)
    except ValueError:
        return False
    return isinstance(image, bytes) or os.path.exists(image)


def _decode_base64(value: str, folder: Path) -> bytes | None:
    """Return the content of base64 text; None if the value is a path."""
    if match := DATA_URL.match(value):
        value = value[match.end() :]
    elif not BASE64.fullmatch(value) or (len(value) < MAX_PATH and (folder / value).exists()):
        return None
    try:
        text = "".join(value.split()).translate(str.maketrans("-_", "+/"))
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
