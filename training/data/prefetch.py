"""Copy remote shards to the local cache ahead of the order in which their pairs are read."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

from torch.utils.data import Sampler

from training.data.mixture import Mixture
from training.data.order import PairSampler
from training.data.remote import RemoteShards
from training.data.shards import ShardError


NUM_DOWNLOADS = 4
MAX_STEPS_AHEAD = 500


class PrefetchingSampler(Sampler):
    """Yield the batches of a sampler, and download the shards of the batches after them.

    Shards of at most half of the cache's size are ahead, so that those in use stay.

    Args:
        sampler: the sampler, of this process.
        pairs: what its indices stand for.
    """

    def __init__(self, sampler: PairSampler, pairs: Mixture):
        self.sampler, self.pairs = sampler, pairs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Daemon threads: a download from a server that is gone must not keep the program from ending.
        requests: SimpleQueue[tuple[int, int]] = SimpleQueue()
        for _ in range(NUM_DOWNLOADS):
            threading.Thread(target=self._download, args=(requests,), daemon=True).start()
        steps_ahead: deque[set[tuple[int, int]]] = deque()  # the remote shards of each step
        outstanding: set[tuple[int, int]] = set()
        ahead = iter(self.sampler)
        for batch in self.sampler:
            while not steps_ahead or (len(steps_ahead) < MAX_STEPS_AHEAD and self._has_room(outstanding)):
                shards = self.pairs.remote_shards([index for _, index in next(ahead)])
                for shard in shards:
                    if shard not in outstanding:
                        outstanding.add(shard)
                        requests.put(shard)
                steps_ahead.append(set(shards))
            steps_ahead.popleft()
            outstanding = set().union(*steps_ahead)
            yield batch

    def _has_room(self, shards: set[tuple[int, int]]) -> bool:
        sizes: dict[int, int] = {}
        for part, shard in shards:
            sizes[part] = sizes.get(part, 0) + self._source(part).states[shard][0]
        return all(2 * size < self._source(part).cache.limit for part, size in sizes.items())

    def _download(self, requests: SimpleQueue[tuple[int, int]]) -> None:
        while True:
            part, shard = requests.get()
            with contextlib.suppress(ShardError):  # the worker that needs the shard raises it
                self._source(part).prefetch(shard)

    def _source(self, part: int) -> RemoteShards:
        shards = self.pairs.parts[part].shards  # type: ignore[attr-defined]
        assert isinstance(shards, RemoteShards)
        return shards
