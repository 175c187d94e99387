"""AmorLIP (Sun et al., NeurIPS 2025, Algorithm 1): learn the partition functions, then train against them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from modeling_amorlip import AmorLIPAmortizer
from modeling_amorlip.loss_amorlip import (
    AMORTIZATION_OBJECTIVES,
    amortization_loss,
    amortized_contrastive_loss,
    blend_log_targets,
    log_partitions,
)

from .base import ContrastiveObjective, ObjectiveOutput


class AmorLIPObjective(ContrastiveObjective):
    """
    Alternates between fitting the amortizer (Stage I) and training the encoders against it (Stage II).

    Three copies of the heads: `online` is fitted by Adam, `target` follows it as a moving average and is what the
    encoders divide by, `previous` is the target as it stood when the epoch before ended. Heads predict the logarithm of
    a *mean*; adding `log_count` turns it into the sum over pairs that `log_partitions` returns.
    """

    @dataclass
    class Arguments:
        """Settings, with the paper's symbols; defaults are its CC12M recipe."""

        amortization: str = "l2_log"
        positive_weight: float = 1e-3  # c, weight of the positive pair in the partition sums
        partition_source: Literal["target_network", "blended"] = "target_network"  # what Stage II divides by
        online_steps: int = 3  # T_lambda, Adam steps a fit
        online_every: int = 1  # T_online, steps between fits
        target_every: int = 2  # T_target, steps between updates of the target heads
        ema_decay: float = 0.92  # alpha
        beta: float = 0.8  # beta_T, share of the previous epoch's heads in the blended target
        beta_decay_epochs: int = 10  # T, epochs until beta is reached
        reinitialize: bool = True  # fresh online and target heads every epoch
        amortizer_learning_rate: float = 1e-3
        rho: float = 0.0  # temperature regulariser rho / s ...
        rho_final: float = 0.0  # ... and its value in the last part of training
        rho_final_fraction: float = 0.25  # that part, as a fraction of the epochs

        def __post_init__(self):
            if self.amortization not in AMORTIZATION_OBJECTIVES:
                raise ValueError(
                    f"objective_args.amortization is {self.amortization!r}; choose one of {AMORTIZATION_OBJECTIVES}."
                )
            if self.partition_source not in ("target_network", "blended"):
                raise ValueError(
                    f"objective_args.partition_source is {self.partition_source!r}; choose target_network or blended."
                )
            for name in ("ema_decay", "rho_final_fraction", "beta"):
                value = getattr(self, name)
                if not 0 <= value <= 1 or (name == "beta" and value == 1):
                    raise ValueError(f"objective_args.{name} must lie in 0 to 1, got {value}.")
            for name in ("online_steps", "online_every", "target_every", "beta_decay_epochs"):
                if getattr(self, name) < 1:
                    raise ValueError(f"objective_args.{name} must be at least 1, got {getattr(self, name)}.")

    def __init__(self, config, arguments, negatives="global"):
        super().__init__(config, arguments, negatives)
        self.online = AmorLIPAmortizer(config)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.previous = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = self._new_optimizer()
        self.step, self.beta, self.rho = 0, 0.0, arguments.rho

    @property
    def amortizer(self) -> AmorLIPAmortizer:
        return self.target

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        settings = self.arguments
        in_final_part = epoch >= num_epochs * (1 - settings.rho_final_fraction)
        self.rho = settings.rho_final if in_final_part else settings.rho
        # beta rises from 0 to beta_T along a half cosine; the first epoch has no previous heads to blend.
        progress = min(epoch / settings.beta_decay_epochs, 1)
        self.beta = settings.beta * (1 - math.cos(math.pi * progress)) / 2
        if epoch > 0:
            self.previous.load_state_dict(self.target.state_dict())
        if epoch > 0 and settings.reinitialize:
            self.online.reset_parameters()
            _average_across_processes(list(self.online.parameters()))
            self.target.load_state_dict(self.online.state_dict())
            self.optimizer = self._new_optimizer()

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        settings = self.arguments
        batch = dict(
            logit_bias=logit_bias, positive_weight=settings.positive_weight, negatives=self.negatives
        )  # fmt: skip
        # 1. Batch estimates of the log-partitions and their blend with the previous epoch's heads, without gradient.
        with torch.no_grad():
            log_z = log_partitions(image_embeds, text_embeds, logit_scale, **batch)
            log_count = self._log_count(len(image_embeds))
            log_targets = [
                blend_log_targets(previous + log_count, estimate, self.beta)
                for previous, estimate in zip(self.previous(image_embeds, text_embeds), log_z, strict=True)
            ]
        # 2. Stage I: fit the online heads; the target heads follow.
        if self.step % settings.online_every == 0:
            self._fit_online(image_embeds.detach(), text_embeds.detach(), log_z, log_targets, log_count)
        if self.step % settings.target_every == 0:
            self._update_target()
        self.step += 1
        # 3. Stage II: the encoders' loss against the amortized log-partitions.
        with torch.no_grad():
            log_lambda = [head + log_count for head in self.target(image_embeds, text_embeds)]
            errors = torch.stack([a - b for a, b in zip(log_lambda, log_z, strict=True)])
            if settings.partition_source == "blended":
                log_lambda = log_targets
        loss = amortized_contrastive_loss(image_embeds, text_embeds, logit_scale, *log_lambda, **batch)
        # 4. Rescale by the temperature, and regularise it.
        rescaled = loss / logit_scale.detach() + self.rho / logit_scale
        metrics = {"contrastive_loss": loss.detach(), "partition_error": errors.square().mean().sqrt()}
        return ObjectiveOutput(rescaled, metrics)

    def _log_count(self, batch_size: int) -> float:
        """Logarithm of the number of terms in a partition sum, the positive counting `positive_weight`."""
        processes = dist.get_world_size() if self.negatives == "global" and dist.is_initialized() else 1
        return math.log(batch_size * processes - 1 + self.arguments.positive_weight)

    @torch.enable_grad()
    def _fit_online(self, image_embeds, text_embeds, log_z, log_targets, log_count: float) -> None:
        for _ in range(self.arguments.online_steps):
            predictions = self.online(image_embeds, text_embeds)
            loss = sum(
                amortization_loss(
                    head + log_count, target, objective=self.arguments.amortization, log_z_batch=estimate
                )
                for head, target, estimate in zip(predictions, log_targets, log_z, strict=True)
            )  # fmt: skip
            gradients = torch.autograd.grad(loss, list(self.online.parameters()))
            for parameter, gradient in zip(self.online.parameters(), gradients, strict=True):
                parameter.grad = gradient
            _average_across_processes([p.grad for p in self.online.parameters()])
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def _update_target(self) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 1 - self.arguments.ema_decay)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.online.parameters(), lr=self.arguments.amortizer_learning_rate)

    def get_extra_state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "step": self.step, "beta": self.beta, "rho": self.rho}

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.beta, self.rho = state["step"], state["beta"], state["rho"]


@torch.no_grad()
def _average_across_processes(tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over all processes, in one collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
