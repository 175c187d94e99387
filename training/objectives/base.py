"""What the trainer knows of an objective, and what objectives share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modeling_amorlip import AmorLIPAmortizer, AmorLIPConfig
from modeling_amorlip.distributed_amorlip import all_gather, all_reduce_mean_, world_size


DECOUPLED = 1e-100
"""Weight of the positive in a partition sum without it: nothing beside any negative, yet a lone pair stays finite."""


@dataclass
class ObjectiveOutput:
    """`loss` [] with its graph, and `metrics`: detached scalars to log, left on their device."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ContrastiveObjective(nn.Module, ABC):
    """
    A loss on a batch of embeddings, with whatever state it needs.

    `Arguments` is the dataclass of its settings (`objective_args` of a recipe). State is what `state_dict` returns; it
    travels in checkpoints, and is the same in every process. The loss is the mean over this process's pairs, its
    gradient that of the mean over all processes after DDP's averaging.
    """

    Arguments: ClassVar[type]
    model_defaults: ClassVar[dict[str, Any]] = {}
    """Fields of a recipe that, where it does not set them, this objective sets otherwise than usual."""
    amortizer: AmorLIPAmortizer | None = None
    """Heads that the finished model is to carry, for objectives that train some."""

    def __init__(self, config: AmorLIPConfig, arguments, negatives: str = "global", num_samples: int = 0):
        """`num_samples` is the size of the data set, for state a sample; raises ValueError on contradictions."""
        super().__init__()
        self.config, self.arguments, self.negatives, self.num_samples = config, arguments, negatives, num_samples

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        """Called before the first step of every epoch (from 0)."""

    @abstractmethod
    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        """[N, d], [N, d] unit-norm embeddings, scale and bias [], sample ids [N] -> loss and metrics."""

    # -- shared by objectives ------------------------------------------------------------------------------------------

    def log_num_pairs(self, batch_size: int, positive_weight: float) -> float:
        """Logarithm of the number of terms in a partition sum, the positive counting `positive_weight`."""
        processes = world_size() if self.negatives == "global" else 1
        return math.log(max(batch_size * processes - 1 + positive_weight, 1e-3))

    def new_amortizer(self) -> AmorLIPAmortizer:
        """Heads as the model's configuration has them; raises ValueError where processes could not agree on them."""
        amortizer = AmorLIPAmortizer(self.config)
        if amortizer.observes:
            self.refuse_local_negatives(f"amortizer_config.head_type {self.config.amortizer_config.head_type!r}")
        return amortizer

    def refuse_local_negatives(self, setting: str) -> None:
        """Raises ValueError where a setting that collects embeddings could not see every process's."""
        if self.negatives == "local" and world_size() > 1:
            raise ValueError(
                f"{setting} collects embeddings, which every process must see: use negatives: global, or leave it out."
            )

    def observe(self, amortizer: AmorLIPAmortizer, image_embeds: Tensor, text_embeds: Tensor, gathered_texts) -> None:
        """Shows heads that collect embeddings those of all processes."""
        if amortizer.observes:
            images = image_embeds.detach() if gathered_texts is None else all_gather(image_embeds)
            amortizer.observe(images, text_embeds.detach() if gathered_texts is None else gathered_texts)


def fit(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    """Takes `steps` optimiser steps on a loss, with gradients averaged over processes."""
    parameters = list(module.parameters())
    with torch.enable_grad():
        for _ in range(steps):
            gradients = torch.autograd.grad(loss(), parameters)
            all_reduce_mean_(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    optimizer.zero_grad()
