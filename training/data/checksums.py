"""Checksums that stores give with their files."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


HTTP_DIGEST = re.compile(r"(md5|sha-256|sha-512)=:?([A-Za-z0-9+/]+=*)", re.IGNORECASE)
MD5 = re.compile(r'"?([0-9a-f]{32})"?')
ALGORITHMS = {"md5": "md5", "sha-256": "sha256", "sha-512": "sha512"}


@dataclass(frozen=True)
class Checksum:
    """A checksum of a whole file.

    Attributes:
        algorithm: its name in `hashlib`.
        digest: in hexadecimal digits.
        is_certain: False if the value may be something else: the ETag of S3 is no MD5 for objects encrypted by KMS.
    """

    algorithm: str
    digest: str
    is_certain: bool = True


def read_checksum(address: str, info: Mapping[str, Any]) -> Checksum | None:
    """Return the checksum in what `fsspec` tells of a file; None if the store gives none.

    The Hub gives a SHA-256, Google's and Azure's stores and some web servers an MD5, S3 an ETag.
    """
    if sha256 := getattr(info.get("lfs"), "sha256", None):
        return Checksum("sha256", sha256)
    if digest := HTTP_DIGEST.search(str(info.get("Digest", ""))):
        return _from_base64(ALGORITHMS[digest[1].lower()], digest[2])
    settings = info.get("content_settings") or {}
    for value in (info.get("md5Hash"), info.get("Content-MD5"), settings.get("content_md5")):
        if isinstance(value, (bytes, bytearray)):
            return Checksum("md5", value.hex())
        if isinstance(value, str):
            return _from_base64("md5", value)
    if address.startswith("s3") and (etag := MD5.fullmatch(str(info.get("ETag", "")))):
        return Checksum("md5", etag[1], is_certain=False)
    return None


def _from_base64(algorithm: str, text: str) -> Checksum | None:
    try:
        return Checksum(algorithm, base64.b64decode(text, validate=True).hex())
    except binascii.Error:
        return None
