"""The order of an epoch's pairs, and the share that each process takes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.mixture import Mixture


MAX_LOOKAHEAD = 8  # global batches of pairs that wait for a batch without their group


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


class EpochOrder:
    """Map an epoch to the indices of its pairs, in order (int64 [len(self)]).

    With `shuffle: samples`, all pairs are shuffled. With `shuffle: shards`, the shards are shuffled and then the pairs
    within windows of `shuffle_buffer`, which reads files nearly sequentially. With `shuffle: none`, pairs keep their
    order. With `samples_per_epoch` or `train_data_weights`, each source is passed through repeatedly and an epoch takes
    the next pairs of each.

    Args:
        pairs: the sources and their shards.
        config: shuffling, weights and seed.
        excluded: indices that never occur.
    """

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


class PairSampler(Sampler):
    """Yield this process's share of every global batch as lists of (epoch, index), without end.

    The last pairs of an epoch, which do not fill a global batch, are dropped. Pairs with equal `groups` values are kept
    out of each other's batches as far as possible.

    Args:
        order: maps an epoch to indices [length].
        length: pairs per epoch.
        batch_size: pairs per process and step.
        num_processes: number of processes.
        process_index: rank of this process.
        groups: a value per pair; None allows any pairs in a batch.
        start_step: step to start at.

    Raises:
        UserError: an epoch does not fill one global batch.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        length: int,
        batch_size: int,
        num_processes: int,
        process_index: int,
        groups: Sequence[Any] | None = None,
        start_step: int = 0,
    ):
        self.order, self.groups = order, groups
        self.global_batch_size = batch_size * num_processes
        self.share = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.steps_per_epoch = length // self.global_batch_size
        self.start_step = start_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{length} pairs do not fill one batch of {self.global_batch_size} "
                f"({batch_size} x {num_processes} processes): lower per_device_train_batch_size."
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.start_step, self.steps_per_epoch)
        while True:
            for step, batch in enumerate(self.batches(epoch)):
                if step >= position:
                    yield [(epoch, index) for index in batch[self.share]]
            epoch, position = epoch + 1, 0

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Iterate over the global batches of an epoch."""
        order, size = self.order(epoch), self.global_batch_size
        if self.groups is not None:
            yield from self._grouped_batches(order, self.groups)
            return
        for step in range(self.steps_per_epoch):
            yield order[step * size : (step + 1) * size].tolist()

    def _grouped_batches(self, order: np.ndarray, groups: Sequence[Any]) -> Iterator[list[int]]:
        """Iterate over batches in which a group occurs once, unless too few other pairs are near.

        A pair whose group already occurs in the batch is deferred to the next batch, where it comes first. When more
        than `MAX_LOOKAHEAD` batches are deferred, the batch takes some of them, so that a frequent group costs no
        search of the whole epoch. Pairs without a group (None) go with all others.
        """
        waiting = deque(order.tolist())
        max_deferred = MAX_LOOKAHEAD * self.global_batch_size
        for _ in range(self.steps_per_epoch):
            batch: list[int] = []
            deferred: list[int] = []
            batch_groups = set()
            while waiting and len(batch) < self.global_batch_size and len(deferred) < max_deferred:
                index = waiting.popleft()
                group = groups[index]
                if group is not None and group in batch_groups:
                    deferred.append(index)
                else:
                    batch_groups.add(group)
                    batch.append(index)
            shortfall = self.global_batch_size - len(batch)
            batch += deferred[:shortfall]
            waiting.extendleft(reversed(deferred[shortfall:]))
            yield batch
