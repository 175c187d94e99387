"""The part of an evaluation that one process does, and the collectives that bring the parts together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError


T = TypeVar("T")


@dataclass(frozen=True)
class ProcessShard:
    """This process's rank among the processes that share an evaluation."""

    rank: int = 0
    processes: int = 1

    def take(self, items: Iterable[T]) -> Iterator[T]:
        """Yield every `processes`-th item, starting at `rank`."""
        return itertools.islice(items, self.rank, None, self.processes)

    def gather(self, rows: Tensor) -> Tensor:
        """Return all processes' rows, [n] or [n, d] on the CPU, concatenated in the order of ranks.

        Processes may have different numbers of rows. Each sends exactly its own rows.

        Raises:
            ValueError: The processes' rows have different widths; raised in all of them.
        """
        if self.processes == 1:
            return rows
        device = _collective_device()
        width = rows.shape[1] if rows.ndim > 1 else 0
        shapes = [torch.zeros(2, dtype=torch.int64, device=device) for _ in range(self.processes)]
        dist.all_gather(shapes, torch.tensor([len(rows), width], device=device))
        sizes = [tuple(shape.tolist()) for shape in shapes]
        # A process without samples does not know the width.
        widths = {size[1] for size in sizes if size[0]} or {width}
        if len(widths) > 1:
            raise ValueError(f"The processes gather rows of different widths: {sorted(widths)}.")
        shape = tuple(widths) if rows.ndim > 1 else ()
        parts = []
        for rank, (number, _) in enumerate(sizes):
            is_own = rank == self.rank
            part = rows.to(device).contiguous() if is_own else rows.new_empty((number, *shape), device=device)
            if number:
                dist.broadcast(part, src=rank)
                parts.append(part.cpu())
        return torch.cat(parts) if parts else rows.new_empty((0, *shape))

    def gather_objects(self, items: list[T]) -> list[T]:
        """Return all processes' items in the order of ranks. They are pickled: use `gather` for tensors."""
        if self.processes == 1:
            return items
        parts: list[Any] = [None] * self.processes
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Make an error in this block, in any process, an error in every process.

        Put everything that can fail on one rank alone into such a block, and collectives outside: a rank that left for
        good would make the other ranks' next collective hang, or meet the wrong one.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        own = [(isinstance(error, UserError), str(error).strip() or type(error).__name__)] if error else []
        failures = self.gather_objects(own)
        if error is not None and failures[0] == own[0]:
            raise error
        if failures:
            is_user_error, message = failures[0]  # the first rank's, so that all ranks report the same
            raise (UserError if is_user_error else RuntimeError)(message) from error


def _collective_device() -> torch.device:
    """Return the device that the process group's collectives take tensors on."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
