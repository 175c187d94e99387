"""Read labels and queries that a user gives, and find those that a model cannot tell apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from eval.apps.outputs import printable
from modeling_amorlip.cli_amorlip import UserError


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines without blank ones; raises `UserError` when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)} cannot be read as UTF-8 text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def split_labels(text: str) -> list[str]:
    """Return the labels in a text, separated by commas or line breaks, each once and without blank ones."""
    return clean_labels(re.split(r"[,\n]", text))


def clean_labels(labels: Sequence[str]) -> list[str]:
    """Return labels without surrounding spaces, blank ones and repetitions, which would share a probability."""
    return list(dict.fromkeys(label.strip() for label in labels if label.strip()))


def check_encodable(texts: Sequence[str]) -> None:
    """Raise `UserError` for a text that is not Unicode, which a shell with another encoding may pass on."""
    for text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{printable(text)} is not valid UTF-8; use a UTF-8 terminal, or put it in a file.")


def find_indistinguishable(texts: Sequence[str], embeds: Tensor, tile_size: int = 1024) -> list[list[str]]:
    """Return groups of different texts that a model embeds alike, from their unit-norm embeddings [T, d]."""
    groups: dict[int, list[str]] = {}
    for start in range(0, len(texts), tile_size):
        tile = embeds[start : start + tile_size]
        # The cosine alone is too coarse in float32: 1e-6 of it are 1e-3 of distance.
        for row, column in (tile @ embeds.T > 1 - 1e-6).nonzero().tolist():
            first, second = start + row, column
            if first < second and (embeds[first] - embeds[second]).abs().max() < 1e-5:
                leader = next((k for k, group in groups.items() if texts[first] in group), first)
                group = groups.setdefault(leader, [texts[leader]])
                if texts[second] not in group:
                    group.append(texts[second])
    return [group for group in groups.values() if len(group) > 1]


def describe_indistinguishable(groups: Sequence[Sequence[str]], length: int = 5) -> str:
    """Return a warning that names up to `length` groups of texts that a model embeds alike."""
    names = "; ".join(" = ".join(repr(text) for text in group) for group in groups[:length])
    more = f" and {len(groups) - length} more groups" if len(groups) > length else ""
    return (
        f"The model reads some labels as the same text, so they share one probability: {names}{more}. "
        "It does not read beyond its context length, and may not distinguish letter case."
    )
