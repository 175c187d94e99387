"""An exponential moving average (EMA) of a model's weights, which is evaluated and saved beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Average the trained weights of a model, and its running statistics, over steps.

    In step t the decay is min(decay, (1 + t) / (10 + t)), so that the initial weights are forgotten early in training.

    Args:
        model: the model; one that is sharded has its average sharded likewise.
        decay: weight of the average in the next one, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._current = dict(_averaged_tensors(model))
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        """The average, by the names of the model's weights."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after a step (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, current = (
            [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
            for tensors in (self.tensors, self._current)
        )
        torch._foreach_lerp_(averages, current, 1 - decay)  # in few kernels, and equal to lerp_ bit for bit

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the present weights."""
        for name, current in self._current.items():
            self.tensors[name].copy_(current)

    def buffers(self) -> list[Tensor]:
        """Return the averages of running statistics."""
        return [self.tensors[name] for name, current in self._current.items() if not isinstance(current, nn.Parameter)]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model its average for the length of a block, without copying; not for a sharded model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, current in self._current.items():
            current.data, self.tensors[name].data = self.tensors[name].data, current.data


def _averaged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            yield from ((f"{name}.{key}", module.get_buffer(key)) for key in ("running_mean", "running_var"))
