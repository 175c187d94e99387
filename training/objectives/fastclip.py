"""SogCLR (Yuan et al. 2022) and FastCLIP (Wei et al., arXiv 2407.01445): a running estimate a sample of its partition.

Both minimise the global contrastive loss tau log g_i, where g_i is the mean of exp(l_ij - l_ii) over all negatives of
the *data set*. The gradient needs 1 / g_i, for which u_i stands, a running average over the batches that sample i has
been in. Estimates are kept as logarithms, since exp(l_ij - l_ii) reaches e^200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling_amorlip.distributed_amorlip import all_gather, world_size
from modeling_amorlip.loss_amorlip import log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput


class FastCLIPObjective(ContrastiveObjective):
    """
    FastCLIP v1 (the model's temperature as it is), v2 (a temperature a sample and modality) and v3 (one, learned).

    Row 0 of the state is images', row 1 texts'. In v2 the model's own logit scale is left alone.
    """

    @dataclass
    class Arguments:
        version: Literal["v1", "v2", "v3"] = "v3"
        gamma: float = 0.2  # weight of the batch in u <- (1 - gamma) u + gamma g, at the end of its schedule
        gamma_decay_fraction: float = 0.5  # part of the epochs over which gamma falls from 1, along a half cosine
        rho: float = 6.5  # regulariser tau rho of v2 and v3
        epsilon: float = 1e-14  # added to u
        temperature_learning_rate: float = 1e-3  # Adam's, of v2's temperatures
        min_temperature: float = 0.01  # of v2

        def __post_init__(self):
            if self.version not in ("v1", "v2", "v3"):
                raise ValueError(f"objective_args.version is {self.version!r}; choose v1, v2 or v3.")
            if not 0 < self.gamma <= 1:
                raise ValueError(f"objective_args.gamma must lie above 0 and at most at 1, got {self.gamma}.")
            for name in ("epsilon", "temperature_learning_rate", "min_temperature"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"objective_args.{name} must be above 0, got {getattr(self, name)}.")

    def __init__(self, config, arguments, negatives="global", num_samples=0):
        super().__init__(config, arguments, negatives, num_samples)
        self.version = getattr(arguments, "version", "v1")
        self.gamma, self.epoch = 1.0, 0
        self.register_buffer("log_u", torch.full((2, num_samples), -math.inf))
        if self.version == "v2":
            self.register_buffer("temperature", torch.full((2, num_samples), math.exp(-config.logit_scale_init_value)))
            self.register_buffer("temperature_mean", torch.zeros(2, num_samples))
            self.register_buffer("temperature_square", torch.zeros(2, num_samples))

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        self.epoch = epoch
        decay_epochs = max(1.0, self.arguments.gamma_decay_fraction * num_epochs)
        progress = min(epoch / decay_epochs, 1)
        self.gamma = self.arguments.gamma + (1 - self.arguments.gamma) * (1 + math.cos(math.pi * progress)) / 2

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        pair = image_embeds, text_embeds
        if self.version == "v2":
            temperature = self.temperature[:, sample_ids]
            log_g = self._log_g_individual(*pair, 1 / temperature)
        else:
            scale = logit_scale if self.version == "v3" else logit_scale.detach()
            temperature = 1 / scale.detach()
            log_g = self._log_g(*pair, scale)
        with torch.no_grad():
            log_u = self._update_estimates(log_g.detach(), sample_ids)
            log_u = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.arguments.epsilon)))
        ratio = (log_g - log_u).exp()  # at most 1 / gamma
        loss = (temperature * ratio).mean()
        if self.version == "v3":
            loss = loss + (log_u.mean() + self.arguments.rho) / logit_scale
        else:
            loss = loss + 0 * logit_scale  # unused, which DDP would take for a mistake
        if self.version == "v2":
            self._update_temperatures(*pair, temperature, log_u, ratio.detach(), sample_ids)
        metrics = {"global_contrastive_loss": (temperature * log_u).mean(), "temperature": temperature.mean()}
        return ObjectiveOutput(loss, metrics)

    def _log_g(self, image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
        """Logarithms of the batch's g in both directions, [2, N]. A logit bias would cancel."""
        log_z = torch.stack(
            log_partitions(image_embeds, text_embeds, scale, positive_weight=DECOUPLED, negatives=self.negatives)
        )
        return log_z - positive_logits(image_embeds, text_embeds, scale) - self.log_num_pairs(len(image_embeds), 0)

    def _log_g_individual(self, image_embeds: Tensor, text_embeds: Tensor, scales: Tensor) -> Tensor:
        """`_log_g` with a scale a sample and direction, [2, N]: each side's scales are folded into its embeddings."""
        options = dict(positive_weight=DECOUPLED, negatives=self.negatives)
        scaled_images, scaled_texts = image_embeds * scales[0, :, None], text_embeds * scales[1, :, None]
        log_z_image, _ = log_partitions(scaled_images, text_embeds, 1.0, **options)
        _, log_z_text = log_partitions(image_embeds, scaled_texts, 1.0, **options)
        positives = positive_logits(image_embeds, text_embeds, 1.0) * scales
        return torch.stack([log_z_image, log_z_text]) - positives - self.log_num_pairs(len(image_embeds), 0)

    def _update_estimates(self, log_g: Tensor, sample_ids: Tensor) -> Tensor:
        """u <- (1 - gamma) u + gamma g for the batch's samples, g for those never seen; returns log u [2, N]."""
        previous, log_u = self.log_u[:, sample_ids], log_g
        if self.gamma < 1:
            mixed = torch.logaddexp(previous + math.log1p(-self.gamma), log_g + math.log(self.gamma))
            log_u = torch.where(previous.isinf(), log_g, mixed)
        self._store(sample_ids, log_u=log_u)
        return log_u

    def _update_temperatures(self, image_embeds, text_embeds, temperature, log_u, ratio, sample_ids) -> None:
        """An Adam step on tau_i (log u_i + rho) for the batch's samples; each is met once an epoch."""
        scales = (1 / temperature).requires_grad_()
        with torch.enable_grad():
            log_g = self._log_g_individual(image_embeds.detach(), text_embeds.detach(), scales)
            (slope,) = torch.autograd.grad(log_g.sum(), scales)
        gradient = (log_u + self.arguments.rho - ratio * slope / temperature).clamp(-5, 5)
        mean = torch.lerp(self.temperature_mean[:, sample_ids], gradient, 0.1)
        square = torch.lerp(self.temperature_square[:, sample_ids], gradient.square(), 0.001)
        unbiased_mean, unbiased_square = mean / (1 - 0.9 ** (self.epoch + 1)), square / (1 - 0.999 ** (self.epoch + 1))
        step = self.arguments.temperature_learning_rate * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
        temperature = (temperature - step).clamp(self.arguments.min_temperature, 1.0)
        self._store(sample_ids, temperature=temperature, temperature_mean=mean, temperature_square=square)

    def _store(self, sample_ids: Tensor, **values: Tensor) -> None:
        """Writes values [2, N] of the batch's samples into the state, those of all processes into every one's."""
        names, stacked = list(values), torch.cat(list(values.values())).T
        if world_size() > 1:
            sample_ids, stacked = all_gather(sample_ids), all_gather(stacked)
        for name, columns in zip(names, stacked.T.split(2), strict=True):
            getattr(self, name)[:, sample_ids] = columns

    def get_extra_state(self) -> dict:
        return {"gamma": self.gamma, "epoch": self.epoch}

    def set_extra_state(self, state: dict) -> None:
        self.gamma, self.epoch = state["gamma"], state["epoch"]


class SogCLRObjective(FastCLIPObjective):
    """SogCLR: gamma is constant, the temperature the model's, as it is."""

    @dataclass
    class Arguments:
        gamma: float = 0.8
        epsilon: float = 1e-14

        def __post_init__(self):
            if not 0 < self.gamma <= 1:
                raise ValueError(f"objective_args.gamma must lie above 0 and at most at 1, got {self.gamma}.")

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        self.epoch, self.gamma = epoch, self.arguments.gamma
