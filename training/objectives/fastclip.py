"""SogCLR (Yuan et al. 2022) and FastCLIP (Wei et al., arXiv 2407.01445): a running partition estimate per sample.

Both minimize the global contrastive loss tau log g_i, where g_i is the mean of exp(l_ij - l_ii) over all negatives of
the *data set*. The gradient needs 1 / g_i, for which u_i stands, a running average over the batches that held sample i.
Estimates are kept as logarithms, since exp(l_ij - l_ii) reaches e^200. SCENT (arXiv 2602.02877) gives each sample an
averaging rate of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.distributed_amorlip import all_gather, world_size
from modeling_amorlip.loss_amorlip import Negatives, log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput


def check_gamma(gamma: float) -> None:
    """Raise ValueError unless gamma lies above 0 and at most at 1."""
    if not 0 < gamma <= 1:
        raise ValueError(f"objective_args.gamma must lie above 0 and at most at 1, got {gamma}.")


class FastCLIPObjective(ContrastiveObjective):
    """
    FastCLIP v1 (fixed temperature), v2 (a temperature per sample and modality) and v3 (one learned temperature).

    Row 0 of the state belongs to images, row 1 to texts. v2 does not train the model's own logit scale.
    """

    @dataclass
    class Arguments:
        """Settings of FastCLIP."""

        version: Literal["v1", "v2", "v3"] = "v3"
        gamma: float = 0.2  # weight of the batch in u <- (1 - gamma) u + gamma g, at the end of its schedule
        gamma_decay_fraction: float = 0.5  # fraction of the epochs over which gamma falls from 1, along a half cosine
        gamma_offset: float | None = None  # gamma is sigmoid(log u + gamma_offset), per sample; SCENT takes 10
        rho: float = 6.5  # temperature regularizer tau rho of v2 and v3
        epsilon: float = 1e-14  # added to u
        temperature_learning_rate: float = 1e-3  # Adam's, for the temperatures of v2
        min_temperature: float = 0.01  # lower bound of the temperatures of v2

        def __post_init__(self) -> None:
            if self.version not in ("v1", "v2", "v3"):
                raise ValueError(f"objective_args.version is {self.version!r}; choose v1, v2 or v3.")
            check_gamma(self.gamma)
            for name in ("epsilon", "temperature_learning_rate", "min_temperature"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"objective_args.{name} must be above 0, got {getattr(self, name)}.")

    log_u: Tensor  # [2, num_samples]
    temperature: Tensor  # [2, num_samples], as the next two, in v2
    temperature_mean: Tensor
    temperature_square: Tensor

    def __init__(
        self, config: AmorLIPConfig, arguments: Any, negatives: Negatives = "global", num_samples: int = 0
    ) -> None:
        super().__init__(config, arguments, negatives, num_samples)
        self.version = getattr(arguments, "version", "v1")
        self.gamma, self.epoch = 1.0, 0
        self.register_buffer("log_u", torch.full((2, num_samples), -math.inf))
        if self.version == "v2":
            self.register_buffer("temperature", torch.full((2, num_samples), math.exp(-config.logit_scale_init_value)))
            self.register_buffer("temperature_mean", torch.zeros(2, num_samples))
            self.register_buffer("temperature_square", torch.zeros(2, num_samples))

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        """Set the epoch's gamma."""
        self.epoch = epoch
        decay_epochs = max(1.0, self.arguments.gamma_decay_fraction * num_epochs)
        progress = min(epoch / decay_epochs, 1)
        self.gamma = self.arguments.gamma + (1 - self.arguments.gamma) * (1 + math.cos(math.pi * progress)) / 2

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        assert sample_ids is not None
        if self.version == "v2":
            temperature = self.temperature[:, sample_ids]
            log_g = self._log_g_per_sample_scale(image_embeds, text_embeds, 1 / temperature)
        else:
            scale = logit_scale if self.version == "v3" else logit_scale.detach()
            temperature = 1 / scale.detach()
            log_g = self._log_g(image_embeds, text_embeds, scale)
        with torch.no_grad():
            log_u = self._update_estimates(log_g.detach(), sample_ids)
            log_u = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.arguments.epsilon)))
        ratio = (log_g - log_u).exp()  # at most 1 / gamma
        loss = (temperature * ratio).mean()
        if self.version == "v3":
            loss = loss + (log_u.mean() + self.arguments.rho) / logit_scale
        else:
            loss = loss + 0 * logit_scale  # DDP expects every parameter to get a gradient
        if self.version == "v2":
            self._update_temperatures(image_embeds, text_embeds, temperature, log_u, ratio.detach(), sample_ids)
        metrics = {"global_contrastive_loss": (temperature * log_u).mean(), "temperature": temperature.mean()}
        return ObjectiveOutput(loss, metrics)

    def _log_g(self, image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
        """Return the logarithms of the batch's g in both directions, [2, N]. A logit bias would cancel."""
        log_z = torch.stack(
            log_partitions(image_embeds, text_embeds, scale, positive_weight=DECOUPLED, negatives=self.negatives)
        )
        return log_z - positive_logits(image_embeds, text_embeds, scale) - self.log_num_pairs(len(image_embeds), 0)

    def _log_g_per_sample_scale(self, image_embeds: Tensor, text_embeds: Tensor, scales: Tensor) -> Tensor:
        """Return `_log_g` with a scale per sample and direction [2, N], folded into the embeddings of each side."""
        scaled_images, scaled_texts = image_embeds * scales[0, :, None], text_embeds * scales[1, :, None]
        log_z_image, _ = log_partitions(
            scaled_images, text_embeds, 1.0, positive_weight=DECOUPLED, negatives=self.negatives
        )
        _, log_z_text = log_partitions(
            image_embeds, scaled_texts, 1.0, positive_weight=DECOUPLED, negatives=self.negatives
        )
        positives = positive_logits(image_embeds, text_embeds, 1.0) * scales
        return torch.stack([log_z_image, log_z_text]) - positives - self.log_num_pairs(len(image_embeds), 0)

    def _update_estimates(self, log_g: Tensor, sample_ids: Tensor) -> Tensor:
        """Return log u [2, N] of the batch's samples after u <- (1 - gamma) u + gamma g; unseen samples start at g."""
        previous, log_u = self.log_u[:, sample_ids], log_g
        offset = getattr(self.arguments, "gamma_offset", None)
        if offset is not None:
            old, new = logsigmoid(-previous - offset), logsigmoid(previous + offset)
            log_u = torch.where(previous.isinf(), log_g, torch.logaddexp(previous + old, log_g + new))
        elif self.gamma < 1:
            mixed = torch.logaddexp(previous + math.log1p(-self.gamma), log_g + math.log(self.gamma))
            log_u = torch.where(previous.isinf(), log_g, mixed)
        self._store(sample_ids, log_u=log_u)
        return log_u

    def _update_temperatures(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        temperature: Tensor,
        log_u: Tensor,
        ratio: Tensor,
        sample_ids: Tensor,
    ) -> None:
        """Take an Adam step on tau_i (log u_i + rho) for the batch's samples, each of which occurs once per epoch.

        Args:
            image_embeds, text_embeds: [N, d].
            temperature: tau, [2, N].
            log_u: [2, N].
            ratio: g / u, [2, N].
            sample_ids: [N].
        """
        scales = (1 / temperature).requires_grad_()
        with torch.enable_grad():
            log_g = self._log_g_per_sample_scale(image_embeds.detach(), text_embeds.detach(), scales)
            (slope,) = torch.autograd.grad(log_g.sum(), scales)
        gradient = (log_u + self.arguments.rho - ratio * slope / temperature).clamp(-5, 5)
        mean = torch.lerp(self.temperature_mean[:, sample_ids], gradient, 0.1)
        square = torch.lerp(self.temperature_square[:, sample_ids], gradient.square(), 0.001)
        unbiased_mean, unbiased_square = mean / (1 - 0.9 ** (self.epoch + 1)), square / (1 - 0.999 ** (self.epoch + 1))
        step = self.arguments.temperature_learning_rate * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
        temperature = (temperature - step).clamp(self.arguments.min_temperature, 1.0)
        self._store(sample_ids, temperature=temperature, temperature_mean=mean, temperature_square=square)

    def _store(self, sample_ids: Tensor, **values: Tensor) -> None:
        """Write values [2, N] of the batch's samples into the state; every process writes those of all processes."""
        names, stacked = list(values), torch.cat(list(values.values())).T
        if world_size() > 1:
            sample_ids, stacked = all_gather(sample_ids), all_gather(stacked)
        for name, columns in zip(names, stacked.T.split(2), strict=True):
            getattr(self, name)[:, sample_ids] = columns

    def get_extra_state(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.gamma, self.epoch = state["gamma"], state["epoch"]


class SogCLRObjective(FastCLIPObjective):
    """SogCLR: gamma is constant, and the objective does not train the temperature."""

    @dataclass
    class Arguments:
        """Settings of SogCLR."""

        gamma: float = 0.8  # weight of the batch in u <- (1 - gamma) u + gamma g
        epsilon: float = 1e-14  # added to u

        def __post_init__(self) -> None:
            check_gamma(self.gamma)

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        """Note the epoch; gamma stays."""
        self.epoch, self.gamma = epoch, self.arguments.gamma
