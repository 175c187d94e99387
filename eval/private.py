"""What must not leave this computer: folders and credentials in the settings, results and logs that are published."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit


LITERAL_FIELDS = ("content", "chat_template", "id2label", "label2id")
"""Fields of Transformers' files whose texts a model depends on, whatever they look like."""
START = r"(?:file:/*(?=/))?(?:~[\w.-]*/|/+|(?<![A-Za-z])[A-Za-z]:[\\/]|\\\\)(?=[^\s\\/])"
"""Beginning of an absolute path: of Unix, of a home folder, of Windows or of a share."""
FOLDER = r"[^\\/'\",;:()<>|\n]+[\\/]+"
ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://(?!/)(?:(?!::)[^\s'\"])+")
FOLDERS = re.compile(rf"{ADDRESS.pattern}|(?<![\w/.~-]){START}(?:{FOLDER})+(?=[^\s\\/])")
PATH = re.compile(rf"{START}[^:\n]+")


def hide_private(value: Any) -> Any:
    """Return settings or results with absolute paths cut to their last part, and addresses without credentials."""
    if isinstance(value, dict):
        return {hide_private(key): item if key in LITERAL_FIELDS else hide_private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_private(item) for item in value]
    if not isinstance(value, str):
        return value
    return "::".join(map(_hide_in_text, value.split("::")))


def _hide_in_text(text: str) -> str:
    if PATH.fullmatch(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return FOLDERS.sub(_shorten, text)


def _shorten(match: re.Match[str]) -> str:
    """Return an address without user, password and query, which may be a signature, and "" for folders."""
    if not ADDRESS.match(match[0]):
        return ""
    address = re.sub(r"(?<=://)[^/@]*@", "", match[0])
    return address.split("?")[0] if urlsplit(address).scheme in ("http", "https") else address
