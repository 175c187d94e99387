"""The order of an epoch's pairs, and how processes share it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.mixture import Mixture


class EpochOrder:
    """epoch -> the indices of its pairs, in order: int array [len(self)].

    `shuffle` "samples" mixes all pairs; "shards" puts whole shards in random order and mixes pairs within
    `shuffle_buffer`, which reads files nearly from beginning to end; "none" leaves them as they lie. With
    `samples_per_epoch` or weights each source is gone through again and again, and an epoch is that many pairs of it.

    Args:
        left_out: indices that never come.
    """

    def __init__(self, pairs: Mixture, arguments: PretrainConfig, left_out: np.ndarray | tuple = ()):
        self.arguments, start = arguments, 0
        self.sources = []  # of each source its shards, as ranges of indices
        for part in pairs.parts:
            ends = start + np.cumsum([0, *part.shard_sizes])
            shards = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            self.sources.append([np.setdiff1d(shard, left_out, assume_unique=True) for shard in shards])
            start = int(ends[-1])
        sizes = [sum(map(len, shards)) for shards in self.sources]
        self.length, self.counts = sum(sizes), None
        if arguments.samples_per_epoch or arguments.train_data_weights:
            shares = np.array(arguments.train_data_weights or sizes, float)
            cuts = np.cumsum(shares / shares.sum()) * (arguments.samples_per_epoch or self.length)
            self.counts = np.diff(np.rint(cuts).astype(int), prepend=0)
            self.length = int(self.counts.sum())

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.arguments.seed, epoch])
        if self.counts is None:
            return self._pass([shard for shards in self.sources for shard in shards], generator)
        parts = []
        for number, (shards, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            size = sum(map(len, shards))
            first, skipped = divmod(epoch * int(count), size)
            passes = range(first, first + -(-(skipped + int(count)) // size))
            seeds = ([self.arguments.seed, 1 + number, p] for p in passes)
            parts.append(
                np.concatenate([self._pass(shards, np.random.default_rng(seed)) for seed in seeds] or [shards[0][:0]])[
                    skipped : skipped + count
                ]
            )
        order = np.concatenate(parts)
        return order if self.arguments.shuffle == "none" else generator.permutation(order)

    def _pass(self, shards: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
        if self.arguments.shuffle == "shards":
            shards = [shards[i] for i in generator.permutation(len(shards))]
        order = np.concatenate(shards)
        if self.arguments.shuffle == "samples":
            return generator.permutation(order)
        if self.arguments.shuffle == "shards":
            window = np.arange(len(order)) // self.arguments.shuffle_buffer
            return order[np.argsort(window + generator.random(len(order)))]
        return order


class PairSampler(Sampler):
    """Yields this process's share of every global batch as lists of (epoch, index), endlessly from `start_step`.

    An epoch drops what does not fill a batch. Pairs with an equal `groups` value are kept out of each other's batches
    as far as that is possible.

    Args:
        order: epoch -> indices [length].
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        length,
        batch_size,
        num_processes,
        process_index,
        groups=None,
        start_step=0,
    ):
        self.order, self.batch_size, self.groups = order, batch_size, groups
        self.global_batch_size = batch_size * num_processes
        self.share = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.steps_per_epoch = length // self.global_batch_size
        self.start_step = start_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{length} pairs do not fill one batch of {self.global_batch_size} "
                f"({batch_size} x {num_processes} processes): lower per_device_train_batch_size."
            )

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """The epoch's global batches."""
        order, size = self.order(epoch), self.global_batch_size
        if self.groups is None:
            for i in range(self.steps_per_epoch):
                yield order[i * size : (i + 1) * size].tolist()
            return
        waiting = deque(order.tolist())
        for _ in range(self.steps_per_epoch):
            batch, met, deferred = [], set(), []
            while waiting and len(batch) < size:
                index = waiting.popleft()
                if self.groups[index] in met:
                    deferred.append(index)
                else:
                    met.add(self.groups[index])
                    batch.append(index)
            shortfall = size - len(batch)
            batch += deferred[:shortfall]
            waiting.extendleft(reversed(deferred[shortfall:]))
            yield batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.start_step, self.steps_per_epoch)
        while True:
            for i, batch in enumerate(self.batches(epoch)):
                if i >= position:
                    yield [(epoch, index) for index in batch[self.share]]
            epoch, position = epoch + 1, 0
