"""NeuCLIP (Wei et al., arXiv 2511.08417): log-partitions by convex conjugate, from a network of prototypes.

log g = min over alpha of exp(-alpha) g + alpha - 1, and the right-hand side is linear in g, so the batch's estimate of
g serves without bias. alpha is a network of the sample: the log-mean-exp over learned prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_amorlip.amortizer_amorlip import AmorLIPAmortizer
from modeling_amorlip.loss_amorlip import amortization_loss, gather_texts, log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput, fit


class NeuCLIPObjective(ContrastiveObjective):
    """
    Alternates AdaGrad steps on the prototypes, encoders fixed, with a step of the encoders, alpha fixed.

    Both minimise tau (exp(-alpha_i) g_i + alpha_i - 1 + rho), g_i the batch's mean of exp(l_ij - l_ii) over negatives,
    alpha_i = log(epsilon + mean_m exp(s <x_i, w_m / |w_m|> - l_ii)).
    """

    model_defaults = {"amortizer_config": {"head_type": "prototype"}}

    @dataclass
    class Arguments:
        network_steps: int = 10  # AdaGrad steps a batch
        network_learning_rate: float = 1e-2
        restart_every: int = 500  # steps between restarts of the prototypes from the embeddings seen last
        rho: float = 6.5  # temperature regulariser tau rho
        epsilon: float = 1e-14

        def __post_init__(self):
            for name in ("network_steps", "restart_every"):
                if getattr(self, name) < 1:
                    raise ValueError(f"objective_args.{name} must be at least 1, got {getattr(self, name)}.")
            for name in ("network_learning_rate", "epsilon"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"objective_args.{name} must be above 0, got {getattr(self, name)}.")

    def __init__(self, config, arguments, negatives="global", num_samples=0):
        super().__init__(config, arguments, negatives, num_samples)
        if config.amortizer_config.head_type != "prototype":
            raise ValueError(
                f"neuclip's network is made of prototypes, and amortizer_config.head_type is "
                f"{config.amortizer_config.head_type!r}: leave it out or make it 'prototype'."
            )
        self.network = self.new_amortizer()
        self.optimizer = self._new_optimizer()
        self.step = 0

    @property
    def amortizer(self) -> AmorLIPAmortizer:
        return self.network

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        settings = self.arguments
        texts = gather_texts(text_embeds, self.negatives)
        log_z = log_partitions(
            image_embeds,
            text_embeds,
            logit_scale,
            positive_weight=DECOUPLED,
            negatives=self.negatives,
            gathered_texts=texts,
        )
        positives = positive_logits(image_embeds, text_embeds, logit_scale)
        log_g = torch.stack(log_z) - positives - self.log_num_pairs(len(image_embeds), 0)
        log_epsilon = torch.full((), math.log(settings.epsilon), device=log_g.device)

        def predict() -> Tensor:
            predictions = torch.stack(self.network(image_embeds, text_embeds, logit_scale))
            return torch.logaddexp(predictions - positives.detach(), log_epsilon)

        self.observe(self.network, image_embeds, text_embeds, texts)
        if self.step % settings.restart_every == 0:
            self.network.reset_parameters()
            self.optimizer = self._new_optimizer()
        self.step += 1
        target = log_g.detach()
        fit(
            self.network,
            self.optimizer,
            lambda: amortization_loss(predict(), target, objective="conjugate"),
            settings.network_steps,
        )
        with torch.no_grad():
            alpha = predict()
            alpha = torch.maximum(alpha, target - 30)
        ratio = (log_g - alpha).exp()
        value = (ratio.detach() + alpha - 1).mean()
        loss = ratio.mean() / logit_scale.detach() + (value + settings.rho) / logit_scale
        error = (alpha - target).square().mean().sqrt()
        return ObjectiveOutput(loss, {"conjugate_loss": value, "partition_error": error})

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.network.parameters(), lr=self.arguments.network_learning_rate)

    def get_extra_state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "step": self.step}

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
