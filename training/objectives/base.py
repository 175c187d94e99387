"""What the trainer knows of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from modeling_amorlip import AmorLIPAmortizer, AmorLIPConfig


@dataclass
class ObjectiveOutput:
    """`loss` [] with its graph, and `metrics`: detached scalars to log, left on their device."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ContrastiveObjective(nn.Module, ABC):
    """
    A loss on a batch of embeddings, with whatever state it needs.

    `Arguments` is the dataclass of its settings (`objective_args` of a recipe). State is what `state_dict` returns; it
    travels in checkpoints. The loss is the mean over this process's pairs, its gradient that of the mean over all
    processes after DDP's averaging.
    """

    Arguments: ClassVar[type]
    amortizer: AmorLIPAmortizer | None = None
    """Heads that the finished model is to carry, for objectives that train some."""

    def __init__(self, config: AmorLIPConfig, arguments, negatives: str = "global"):
        super().__init__()
        self.config, self.arguments, self.negatives = config, arguments, negatives

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
