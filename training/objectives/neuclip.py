"""NeuCLIP (Wei et al., arXiv 2511.08417): log-partitions by convex conjugate, from a network of prototypes.

log g = min over alpha of exp(-alpha) g + alpha - 1. The right-hand side is linear in g, so an estimate of g from the
batch serves without bias. alpha is a network of the sample: the log-mean-exp over learned prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.amortizer_amorlip import AmorLIPAmortizer
from modeling_amorlip.loss_amorlip import Negatives, amortization_loss, gather_texts, log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput, fit, head_type


MAX_LOG_RATIO = 30.0
"""Nats that alpha may lie below its estimate, so that the ratio of the two cannot overflow."""


class NeuCLIPObjective(ContrastiveObjective):
    """
    Alternate AdaGrad steps on the prototypes, with encoders fixed, and a step of the encoders, with alpha fixed.

    Both minimize tau (exp(-alpha_i) g_i + alpha_i - 1 + rho), where g_i is the batch's mean of exp(l_ij - l_ii) over
    negatives and alpha_i = log(epsilon + mean_m exp(s <x_i, w_m / |w_m|> - l_ii)).
    """

    model_defaults = {"amortizer_config": {"head_type": "prototype"}}

    @dataclass
    class Arguments:
        """Settings of NeuCLIP."""

        network_steps: int = 10  # AdaGrad steps per batch
        network_learning_rate: float = 1e-2
        restart_every: int = 500  # steps between restarts of the prototypes from the latest embeddings
        rho: float = 6.5  # temperature regularizer tau rho
        epsilon: float = 1e-14

        def __post_init__(self) -> None:
            for name in ("network_steps", "restart_every"):
                if getattr(self, name) < 1:
                    raise ValueError(f"objective_args.{name} must be at least 1, got {getattr(self, name)}.")
            for name in ("network_learning_rate", "epsilon"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"objective_args.{name} must be above 0, got {getattr(self, name)}.")

    def __init__(self, config: AmorLIPConfig, arguments: Any, negatives: Negatives = "global", num_samples: int = 0):
        super().__init__(config, arguments, negatives, num_samples)
        if head_type(config) != "prototype":
            raise ValueError(
                "neuclip's network is made of prototypes, but amortizer_config.head_type is "
                f"{head_type(config)!r}: leave it out or set it to 'prototype'."
            )
        self.network = self.new_amortizer()
        self.optimizer = self._new_optimizer()
        self.step = 0

    @property
    def amortizer(self) -> AmorLIPAmortizer:
        return self.network

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        texts = gather_texts(text_embeds, self.negatives)
        log_g, positives = self._log_g(image_embeds, text_embeds, logit_scale, texts)
        target = log_g.detach()
        log_epsilon = torch.full((), math.log(self.arguments.epsilon), device=log_g.device)

        def predict() -> Tensor:
            predictions = torch.stack(self.network(image_embeds, text_embeds, logit_scale))
            return torch.logaddexp(predictions - positives.detach(), log_epsilon)

        # 1. Fit the network, encoders fixed.
        self.observe(self.network, image_embeds, text_embeds, texts)
        if self.step % self.arguments.restart_every == 0:
            self.network.reset_parameters()
            self.optimizer = self._new_optimizer()
        self.step += 1
        fit(
            self.network,
            self.optimizer,
            lambda: amortization_loss(predict(), target, objective="conjugate"),
            self.arguments.network_steps,
        )
        # 2. The loss of the encoders, the network fixed.
        with torch.no_grad():
            alpha = torch.maximum(predict(), target - MAX_LOG_RATIO)
        ratio = (log_g - alpha).exp()
        value = (ratio.detach() + alpha - 1).mean()
        loss = ratio.mean() / logit_scale.detach() + (value + self.arguments.rho) / logit_scale
        error = (alpha - target).square().mean().sqrt()
        return ObjectiveOutput(loss, {"conjugate_loss": value, "partition_error": error})

    def _log_g(
        self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, gathered_texts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithms of g in both directions [2, N], and the positive logits [N]."""
        log_z = log_partitions(
            image_embeds,
            text_embeds,
            logit_scale,
            positive_weight=DECOUPLED,
            negatives=self.negatives,
            gathered_texts=gathered_texts,
        )
        positives = positive_logits(image_embeds, text_embeds, logit_scale)
        return torch.stack(log_z) - positives - self.log_num_pairs(len(image_embeds), 0), positives

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.network.parameters(), lr=self.arguments.network_learning_rate)

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
