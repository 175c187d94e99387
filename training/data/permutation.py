"""Permutations and subsets of indices with random access, in memory that does not grow with their length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


NUM_ROUNDS = 6


class Permutation:
    """A pseudorandom permutation of 0 to length - 1, computed position by position.

    A Feistel network permutes the integers below the next power of two; results of at least `length` are permuted again
    until they are smaller (cycle walking; Black and Rogaway, 2002, Section 3).

    Args:
        length: number of indices.
        key: integers that select the permutation.
    """

    def __init__(self, length: int, key: Sequence[int]):
        bits = max(2, (length - 1).bit_length())
        self.length = length
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        self._keys = np.random.SeedSequence(list(key)).generate_state(NUM_ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.length

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices (int64 [N]) at positions (int64 [N])."""
        indices = self._permute(positions.astype(np.uint64))
        while (outside := indices >= self.length).any():
            indices[outside] = self._permute(indices[outside])
        return indices.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        low, high = values & self._low_mask, values >> self._low_bits
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                high = high ^ (_mix(low + key) & self._high_mask)
            else:
                low = low ^ (_mix(high + key) & self._low_mask)
        return (high << self._low_bits) | low


class Complement(Sequence[int]):
    """The indices 0 to length - 1 without some of them, in order, with random access.

    Args:
        length: number of indices before exclusion.
        excluded: indices left out.
    """

    def __init__(self, length: int, excluded: np.ndarray | Sequence[int] = ()):
        self.excluded = np.unique(np.asarray(excluded, np.int64))
        self.length = length - len(self.excluded)
        self._shifted = self.excluded - np.arange(len(self.excluded))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: Any) -> Any:
        """Return the index at a position, or the indices at an array of positions."""
        return position + np.searchsorted(self._shifted, position, side="right")


def _mix(values: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes (the finalizer of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
