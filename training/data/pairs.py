"""The interface of a source of image-text pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class Pairs(ABC):
    """Image-text pairs with random access.

    Attributes:
        source: the entry of `train_data` that names the source.
        shard_sizes: number of pairs in each shard, in order.
        damage: what is wrong with a shard, by file name.
    """

    source: str
    shard_sizes: list[int]
    damage: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of a pair by name, with the image as bytes or a path.

        Raises:
            Exception: whatever reading a damaged file or text raises.
        """

    @abstractmethod
    def describe(self, index: int) -> tuple[str, str]:
        """Return the key of a pair and the file that holds it, for messages."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """Iterate over all captions that are text."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Return the values of a column, one per pair.

        Raises:
            UserError: the source has no such column.
        """
