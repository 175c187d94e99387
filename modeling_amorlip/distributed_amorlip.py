"""Collectives over the processes of a run; each does nothing in a run of one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates equally shaped tensors of all processes along the first dimension, in order of rank."""
    tensor = tensor.detach().contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean_(tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over all processes, in one collective."""

    def average(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= world_size()

    _in_one_collective(tensors, average)


def broadcast_from_main_(tensors: list[Tensor]) -> None:
    """Replaces tensors by the first process's, in one collective."""
    _in_one_collective(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _in_one_collective(tensors: list[Tensor], collective: Callable[[Tensor], None]) -> None:
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    collective(flat)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))
