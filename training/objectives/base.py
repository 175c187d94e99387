"""The interface of objectives, and what several of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modeling_amorlip import AmorLIPAmortizer, AmorLIPConfig
from modeling_amorlip.configuration_amorlip import AmorLIPAmortizerConfig
from modeling_amorlip.distributed_amorlip import all_gather, all_reduce_mean_, world_size
from modeling_amorlip.loss_amorlip import Negatives


DECOUPLED = 1e-100
"""Weight that removes the positive pair from a partition sum, yet keeps the sum of a batch of one pair finite."""


@dataclass
class ObjectiveOutput:
    """The loss [] with its graph, and detached scalars to log, left on their device."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ContrastiveObjective(nn.Module, ABC):
    """
    A loss on a batch of embeddings, with the state that it needs.

    `state_dict` holds all state; it is saved in checkpoints and is identical in all processes. The loss is the mean
    over the pairs of this process. After DDP has averaged gradients over processes, they are those of the mean over all
    pairs.

    Args:
        config: configuration of the model.
        arguments: an instance of the class's `Arguments`.
        negatives: `"global"` for the batches of all processes, `"local"` for this process's batch.
        num_samples: number of pairs in the data, for state per pair.

    Raises:
        ValueError: settings contradict each other.
    """

    Arguments: ClassVar[type]
    """Dataclass of the settings (`objective_args` in a recipe)."""
    model_defaults: ClassVar[dict[str, Any]] = {}
    """Fields of a recipe with another default under this objective."""

    def __init__(self, config: AmorLIPConfig, arguments: Any, negatives: Negatives = "global", num_samples: int = 0):
        super().__init__()
        self.config, self.arguments, self.negatives, self.num_samples = config, arguments, negatives, num_samples

    @property
    def amortizer(self) -> AmorLIPAmortizer | None:
        """The heads that the saved model carries; None for an objective that trains none."""
        return None

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        """Prepare for an epoch (from 0), before its first step."""

    @abstractmethod
    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the loss of a batch, and update the objective's own state.

        Args:
            image_embeds: [N, d], of unit norm.
            text_embeds: [N, d], of unit norm.
            logit_scale: [], the scale itself, not its logarithm.
            logit_bias: [] or None.
            sample_ids: int64 [N], index of each pair in the data.
        """

    # -- shared by objectives ------------------------------------------------------------------------------------------

    def log_num_pairs(self, batch_size: int, positive_weight: float) -> float:
        """Return the logarithm of the number of terms in a partition sum; the positive counts `positive_weight`."""
        processes = world_size() if self.negatives == "global" else 1
        return math.log(max(batch_size * processes - 1 + positive_weight, 1e-3))

    def new_amortizer(self) -> AmorLIPAmortizer:
        """Return fresh heads of the model's configuration.

        Raises:
            ValueError: the heads collect embeddings, and processes would not see the same ones.
        """
        amortizer = AmorLIPAmortizer(self.config)
        if amortizer.observes:
            self.refuse_local_negatives(f"amortizer_config.head_type {head_type(self.config)!r}")
        return amortizer

    def refuse_local_negatives(self, setting: str) -> None:
        """Raise ValueError if a setting that collects embeddings could not see those of all processes."""
        if self.negatives == "local" and world_size() > 1:
            raise ValueError(
                f"{setting} collects embeddings, which every process must see: use negatives: global, or leave it out."
            )

    def observe(
        self, amortizer: AmorLIPAmortizer, image_embeds: Tensor, text_embeds: Tensor, gathered_texts: Tensor | None
    ) -> None:
        """Pass the embeddings of all processes to heads that collect embeddings.

        Args:
            amortizer: the heads; nothing happens if they collect none.
            image_embeds, text_embeds: [N, d], this process's.
            gathered_texts: text embeddings of all processes, None without gathering.
        """
        if amortizer.observes:
            images = image_embeds.detach() if gathered_texts is None else all_gather(image_embeds)
            amortizer.observe(images, text_embeds.detach() if gathered_texts is None else gathered_texts)


def head_type(config: AmorLIPConfig) -> str:
    """Return the kind of the amortizer heads that a model's configuration names."""
    assert isinstance(config.amortizer_config, AmorLIPAmortizerConfig)
    return config.amortizer_config.head_type


def fit(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    """Take `steps` optimizer steps on a loss of a module's parameters, with gradients averaged over processes."""
    parameters = list(module.parameters())
    with torch.enable_grad():
        for _ in range(steps):
            gradients = list(torch.autograd.grad(loss(), parameters))
            all_reduce_mean_(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    optimizer.zero_grad()
