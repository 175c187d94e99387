"""What every source of image-text pairs offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class Pairs(ABC):
    """Image-text pairs by number; `shard_sizes` says which of them lie together."""

    source: str
    shard_sizes: list[int]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Columns by name, the image as bytes or a path. Raises what the file or its text is damaged by."""

    @abstractmethod
    def describe(self, index: int) -> tuple[str, str]:
        """(key of the pair, the file it is in), for messages."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """All captions that are text."""

    @abstractmethod
    def column(self, name: str) -> list:
        """A column's values; raises `UserError` when there is none."""
