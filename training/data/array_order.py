"""Orders as arrays, of runs that began before orders were computed lazily."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.config import PretrainConfig
from training.data.mixture import Mixture


class ArrayOrder:
    """Version 1 of `EpochOrder`: an array of all pairs per epoch (int64 [len(self)]); arguments as there."""

    def __init__(self, pairs: Mixture, config: PretrainConfig, excluded: np.ndarray | Sequence[int] = ()):
        self.config, self.excluded = config, np.sort(np.asarray(excluded, np.int64))
        self.sources: list[list[np.ndarray]] = []  # the indices of each shard of each source
        start = 0
        for part in pairs.parts:
            ends = start + np.cumsum([0, *part.shard_sizes])
            shards = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            self.sources.append([np.setdiff1d(shard, excluded, assume_unique=True) for shard in shards])
            start = int(ends[-1])
        sizes = [sum(map(len, shards)) for shards in self.sources]
        self.length = sum(sizes)
        self.counts: np.ndarray | None = None  # pairs per epoch of each source
        if config.samples_per_epoch or config.train_data_weights:
            shares = np.array(config.train_data_weights or sizes, float)
            cuts = np.cumsum(shares / shares.sum()) * (config.samples_per_epoch or self.length)
            self.counts = np.diff(np.rint(cuts).astype(int), prepend=0)
            self.length = int(self.counts.sum())

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.config.seed, epoch])
        if self.counts is None:
            return self._order_pass([shard for shards in self.sources for shard in shards], generator)
        order = np.concatenate([self._take(number, epoch) for number in range(len(self.sources))])
        return order if self.config.shuffle == "none" else generator.permutation(order)

    def _take(self, number: int, epoch: int) -> np.ndarray:
        """Return the pairs that an epoch takes of a source, which is passed through again and again."""
        assert self.counts is not None
        shards, count = self.sources[number], int(self.counts[number])
        size = sum(map(len, shards))
        first, skipped = divmod(epoch * count, size)
        passes = [
            self._order_pass(shards, np.random.default_rng([self.config.seed, 1 + number, first + i]))
            for i in range(-(-(skipped + count) // size))
        ]
        return np.concatenate(passes or [shards[0][:0]])[skipped : skipped + count]

    def _order_pass(self, shards: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
        """Return the indices of shards in the order of one pass."""
        if self.config.shuffle == "shards":
            shards = [shards[i] for i in generator.permutation(len(shards))]
        order = np.concatenate(shards)
        if self.config.shuffle == "samples":
            return generator.permutation(order)
        if self.config.shuffle == "shards":
            window = np.arange(len(order)) // self.config.shuffle_buffer
            return order[np.argsort(window + generator.random(len(order)))]
        return order
