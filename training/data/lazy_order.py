"""Data orders that are computed on access; memory grows with the number of shards, not with the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.mixture import Mixture
from training.data.permutation import Complement, Permutation


# First words of the keys of permutations, so that no two of them are alike.
EPOCH_KEY, SHARDS_KEY, WINDOW_KEY = 1, 2, 3


@dataclass
class _Source:
    """The pairs that are passed through together.

    Attributes:
        starts: rank of the first pair of each shard among all pairs that are not excluded.
        sizes: pairs of each shard that are not excluded.
        length: number of these pairs.
    """

    starts: np.ndarray
    sizes: np.ndarray

    def __post_init__(self):
        self.length = int(self.sizes.sum())


class LazyOrder:
    """Map an epoch to the order of its pairs; see `EpochOrder`.

    With `shuffle: shards` and several passes through each source, a window takes its share of every source.

    Args:
        pairs: the sources and their shards.
        config: shuffling, weights and seed.
        excluded: indices that never occur.
    """

    def __init__(self, pairs: Mixture, config: PretrainConfig, excluded: np.ndarray | Sequence[int] = ()):
        self.config = config
        self.pairs = Complement(sum(sum(part.shard_sizes) for part in pairs.parts), excluded)
        sources, start = [], 0
        for part in pairs.parts:
            ends = start + np.cumsum(part.shard_sizes, dtype=np.int64)
            edges = np.concatenate([[start], ends])
            ranks = edges - np.searchsorted(self.pairs.excluded, edges)
            sources.append(_Source(ranks[:-1], np.diff(ranks)))
            start = int(ends[-1])
        self.has_passes = bool(config.samples_per_epoch or config.train_data_weights)
        if self.has_passes:
            self.sources = sources
            self.counts = _divide(config, np.array([source.length for source in sources]))
            for source, part in zip(sources, pairs.parts, strict=True):
                if source.length == 0:
                    raise UserError(f"validation_samples leaves no pair of {part.source} to train on: lower it.")
        else:
            starts, sizes = ([getattr(source, name) for source in sources] for name in ("starts", "sizes"))
            self.sources = [_Source(np.concatenate(starts), np.concatenate(sizes))]
            self.counts = np.array([len(self.pairs)])
        self.windows = _divide_windows(self.counts, config.shuffle_buffer) if config.shuffle == "shards" else None

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __call__(self, epoch: int) -> EpochIndices:
        return EpochIndices(self, epoch)


class EpochIndices:
    """The indices of one epoch, computed when a part of them is read.

    Args:
        order: the order that it belongs to.
        epoch: number of the epoch.
    """

    def __init__(self, order: LazyOrder, epoch: int):
        self.order, self.epoch = order, epoch
        self.seed, self.shuffle = order.config.seed, order.config.shuffle
        self._shards: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.order)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int64)

    def __getitem__(self, positions: slice | np.ndarray) -> np.ndarray:
        """Return the indices (int64 [N]) at positions."""
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        sources, offsets = self._find_sources(np.asarray(positions, np.int64))
        ranks = np.empty_like(offsets)
        for number in np.unique(sources):
            mask = sources == number
            ranks[mask] = self._take(int(number), offsets[mask])
        return self.order.pairs[ranks]

    def _find_sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which source each position reads, and how many pairs of it the epoch reads before."""
        order = self.order
        if order.windows is not None:
            return self._find_in_windows(positions, order.windows)
        if order.has_passes and self.shuffle == "samples":
            positions = Permutation(len(self), (self.seed, EPOCH_KEY, self.epoch))(positions)
        ends = np.cumsum(order.counts)
        sources = np.searchsorted(ends, positions, side="right")
        return sources, positions - (ends - order.counts)[sources]

    def _find_in_windows(self, positions: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shuffle positions within windows; the pairs of a window are those that each source reads next."""
        edges = windows.sum(1)
        numbers = np.searchsorted(edges, positions, side="right") - 1
        sources, offsets = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers):
            mask = numbers == number
            permutation = Permutation(
                int(edges[number + 1] - edges[number]), (self.seed, WINDOW_KEY, self.epoch, number)
            )
            places = permutation(positions[mask] - edges[number])
            counts = windows[number + 1] - windows[number]
            ends = np.cumsum(counts)
            source = np.searchsorted(ends, places, side="right")
            sources[mask] = source
            offsets[mask] = windows[number][source] + places - (ends - counts)[source]
        return sources, offsets

    def _take(self, number: int, offsets: np.ndarray) -> np.ndarray:
        """Return the ranks of the pairs that the epoch reads of a source, which is passed through again and again."""
        source = self.order.sources[number]
        if not self.order.has_passes:
            return self._order_pass(source, offsets, (self.epoch, 0))
        offsets = offsets + self.epoch * int(self.order.counts[number])
        passes, offsets = np.divmod(offsets, source.length)
        ranks = np.empty_like(offsets)
        for pass_number in np.unique(passes):
            mask = passes == pass_number
            ranks[mask] = self._order_pass(source, offsets[mask], (int(pass_number), 1 + number))
        return ranks

    def _order_pass(self, source: _Source, offsets: np.ndarray, key: tuple[int, int]) -> np.ndarray:
        """Return the ranks of the pairs at offsets of one pass through a source."""
        if self.shuffle == "samples":
            return source.starts[0] + Permutation(source.length, (self.seed, SHARDS_KEY, *key))(offsets)
        if self.shuffle == "none":
            return source.starts[0] + offsets
        if key not in self._shards:
            shards = Permutation(len(source.sizes), (self.seed, SHARDS_KEY, *key))(np.arange(len(source.sizes)))
            self._shards[key] = shards, np.cumsum(source.sizes[shards]) - source.sizes[shards]
        shards, starts = self._shards[key]
        place = np.searchsorted(starts, offsets, side="right") - 1
        return source.starts[shards[place]] + offsets - starts[place]


def _divide(config: PretrainConfig, sizes: np.ndarray) -> np.ndarray:
    """Return how many pairs an epoch reads of each source."""
    shares = np.array(config.train_data_weights or sizes, float)
    cuts = np.cumsum(shares / shares.sum()) * (config.samples_per_epoch or int(sizes.sum()))
    return np.diff(np.rint(cuts).astype(np.int64), prepend=0)


def _divide_windows(counts: np.ndarray, size: int) -> np.ndarray:
    """Return how many pairs of each source come before each window (int64 [windows + 1, sources])."""
    number = max(1, -(-int(counts.sum()) // size))
    # Exact in 64 bits: no remainder times number is above 2 ** 63.
    whole, rest = np.divmod(counts, number)
    steps = np.arange(number + 1)[:, None]
    return whole * steps + rest * steps // number
