"""Collectives over the ranks of a run. In a run of one process there is nothing to communicate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first dimension, in order of rank.

    Needs a process group. No gradient flows back.
    """
    tensor = tensor.detach().contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def first_row(rows: int) -> int:
    """Return where this rank's rows start in what `all_gather` returns, given that each rank has `rows` of them."""
    return dist.get_rank() * rows


def sum_own_rows(gathered: Tensor, rows: int) -> Tensor:
    """Sum a tensor shaped like `all_gather`'s result over all ranks, in place, and return this rank's rows of it."""
    dist.all_reduce(gathered)
    start = first_row(rows)
    return gathered[start : start + rows]


def all_reduce_mean_(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over all ranks, in one collective."""

    def average(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= world_size()

    _in_one_collective(tensors, average)


def broadcast_from_main_(tensors: list[Tensor]) -> None:
    """Replace tensors by those of rank 0, in one collective."""
    _in_one_collective(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _in_one_collective(tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    collective(flat)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))
