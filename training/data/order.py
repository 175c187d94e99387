"""The order of an epoch's pairs, and the share that each process takes of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.array_order import ArrayOrder
from training.data.lazy_order import LazyOrder
from training.data.mixture import Mixture


ORDER_VERSION = 2
"""Version of the order of new runs. A checkpoint names the version of its run, which continues with it."""
MAX_LOOKAHEAD = 8  # global batches of pairs that wait for a batch without their group
CHUNK = 65536  # indices computed at a time where groups are searched


class Indices(Protocol):
    """The indices of an epoch in order, an array or computed when they are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: slice) -> np.ndarray: ...


class EpochOrder:
    """Map an epoch to the indices of its pairs, in order.

    With `shuffle: samples`, all pairs are shuffled. With `shuffle: shards`, the shards are shuffled and then the pairs
    within windows of `shuffle_buffer`, which reads files nearly sequentially. With `shuffle: none`, pairs keep their
    order. With `samples_per_epoch` or `train_data_weights`, each source is passed through repeatedly and an epoch takes
    the next pairs of each.

    Args:
        pairs: the sources and their shards.
        config: shuffling, weights and seed.
        excluded: indices that never occur.
        version: 2 computes indices on access, and its memory grows with the number of shards; 1 is the order of older
            runs, with an array of all pairs.

    Raises:
        UserError: the version is unknown.
    """

    def __init__(
        self,
        pairs: Mixture,
        config: PretrainConfig,
        excluded: np.ndarray | Sequence[int] = (),
        version: int = ORDER_VERSION,
    ):
        if version not in (1, 2):
            raise UserError(
                f"The checkpoint has data order {version}; this program knows 1 and 2: continue it with a newer one."
            )
        self.version, self._pairs, self._config = version, pairs, config
        self.excluded = np.unique(np.asarray(excluded, np.int64))
        self._order = (ArrayOrder if version == 1 else LazyOrder)(pairs, config, self.excluded)

    def __len__(self) -> int:
        return len(self._order)

    def __call__(self, epoch: int) -> Indices:
        return self._order(epoch)

    def with_version(self, version: int) -> EpochOrder:
        """Return the order of the same pairs in another version.

        Raises:
            UserError: the version is unknown.
        """
        return EpochOrder(self._pairs, self._config, self.excluded, version)


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
        order: Callable[[int], Indices],
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
            for share in self._shares(epoch, position):
                yield [(epoch, index) for index in share]
            epoch, position = epoch + 1, 0

    def set_order_version(self, version: int) -> None:
        """Change to the order that the run of a checkpoint began with.

        Raises:
            UserError: the version is unknown.
        """
        if isinstance(self.order, EpochOrder) and self.order.version != version:
            self.order = self.order.with_version(version)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Iterate over the global batches of an epoch from a step on."""
        order, size = self.order(epoch), self.global_batch_size
        if self.groups is not None:
            # Which pairs are deferred to a batch depends on all batches before it.
            yield from itertools.islice(self._grouped_batches(order, self.groups), start, None)
            return
        for step in range(start, self.steps_per_epoch):
            yield order[step * size : (step + 1) * size].tolist()

    def _shares(self, epoch: int, start: int) -> Iterator[list[int]]:
        """Iterate over this process's part of the batches of an epoch, without the indices of other processes."""
        if self.groups is not None:
            yield from (batch[self.share] for batch in self.batches(epoch, start))
            return
        order = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            first = step * self.global_batch_size
            yield order[first + self.share.start : first + self.share.stop].tolist()

    def _grouped_batches(self, order: Indices, groups: Sequence[Any]) -> Iterator[list[int]]:
        """Iterate over batches in which a group occurs once, unless too few other pairs are near.

        A pair whose group already occurs in the batch is deferred to the next batch, where it comes first. When more
        than `MAX_LOOKAHEAD` batches are deferred, the batch takes some of them, so that a frequent group costs no
        search of the whole epoch. Pairs without a group (None) go with all others.
        """
        indices = (i for k in range(0, len(order), CHUNK) for i in order[k : k + CHUNK].tolist())
        waiting: deque[int] = deque()
        max_deferred = MAX_LOOKAHEAD * self.global_batch_size
        for _ in range(self.steps_per_epoch):
            batch: list[int] = []
            deferred: list[int] = []
            batch_groups = set()
            while len(batch) < self.global_batch_size and len(deferred) < max_deferred:
                index = waiting.popleft() if waiting else next(indices, None)
                if index is None:
                    break
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
