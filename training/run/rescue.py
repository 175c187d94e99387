"""Undo what a failed step has changed, so that the steps before it can be saved."""

from __future__ import annotations

import torch
from torch import Tensor

from training.gradient_cache import get_random_state, set_random_state
from training.model.encoder import EncoderWithObjective


class StepSnapshot:
    """What a step changes before it calls the objective: random states and running statistics.

    The objective's own state can be as large as the data set, so it is not copied. A step that has called the objective
    cannot be undone.

    Args:
        module: the module that is trained, before the step.
    """

    def __init__(self, module: EncoderWithObjective):
        self._module = module
        self._num_objective_calls = module.num_objective_calls
        self._random_state = get_random_state()
        self._buffers: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.clone())
            for submodule in module.encoder.modules()
            if submodule.training and isinstance(submodule, torch.nn.modules.batchnorm._BatchNorm)
            for buffer in submodule.buffers(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> bool:
        """Undo the step; return False, with nothing changed, if it has called the objective."""
        if self._module.num_objective_calls != self._num_objective_calls:
            return False
        set_random_state(self._random_state)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        return True
