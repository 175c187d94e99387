"""AmorLIP (Sun et al., NeurIPS 2025, Algorithm 1): learn the partition functions, then train against them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.amortizer_amorlip import AmorLIPAmortizer, EmbeddingRing
from modeling_amorlip.distributed_amorlip import all_gather, all_reduce_mean_, broadcast_from_main_
from modeling_amorlip.loss_amorlip import (
    AMORTIZATION_OBJECTIVES,
    Negatives,
    amortization_loss,
    amortized_contrastive_loss,
    blend_log_targets,
    gather_texts,
    log_partitions,
)
from modeling_amorlip.tiles_amorlip import log_sum_exps
from training.objectives.base import ContrastiveObjective, ObjectiveOutput, fit


MAX_LOG_RATIO = 10.0
"""Nats that a log-partition may lie below its batch estimate. A batch of N is off by log N at most."""
SAVED_ATTRIBUTES = ("step", "fresh", "beta", "rho", "any_recent")
"""State in checkpoints besides tensors."""
PARTITION_SOURCES = ("target_network", "blended", "online", "batch")


@dataclass
class EmbeddedBatch:
    """A batch as the steps of the algorithm read it, and what they compute from it on the way."""

    image_embeds: Tensor  # [N, d]
    text_embeds: Tensor  # [N, d]
    logit_scale: Tensor  # []
    logit_bias: Tensor | None  # []
    gathered_texts: Tensor | None  # text embeddings of all processes; None for local negatives
    log_count: float  # logarithm of the number of terms in a partition sum
    log_z: list[Tensor] | None = None  # batch estimates of the log-partitions, [N] per modality
    log_targets: list[Tensor] | None = None  # their blend with the previous heads, [N] per modality


class AmorLIPObjective(ContrastiveObjective):
    """
    Alternate between fitting the amortizer (Stage I) and training the encoders against it (Stage II).

    There are three copies of the heads. Adam fits `online`; `target` is its moving average; `previous` is the target at
    the end of the previous epoch, which blends into the targets (Eq. 12). Where heads are not reinitialized every
    epoch, the target itself takes the place of `previous`. Heads predict the logarithm of a *mean*; adding `log_count`
    turns it into the sum over pairs that `log_partitions` returns. Fresh heads start at the mean of their first
    targets. The paper lets them drift there from 0, which would divide by a wrong constant for hundreds of steps.
    """

    @dataclass
    class Arguments:
        """
        Settings, with the paper's symbols.

        The defaults did best on the study's development set. The recipes cc3m_rn50.yaml and cc12m_vit_b32.yaml hold the
        paper's own settings.
        """

        amortization: str = "conjugate"  # objective of Stage I
        regularizer: float = 0.1  # weight of l2_log in kl, kl_sym and js
        positive_weight: float = 1e-3  # c, weight of the positive pair in the partition sums
        partition_source: str = "blended"  # what Stage II divides by; "batch" amortizes nothing
        online_steps: int = 3  # T_lambda, Adam steps per fit
        online_every: int = 1  # T_online, steps between fits
        target_every: int = 2  # T_target, steps between updates of the target heads
        ema_decay: float = 0.99  # alpha
        beta: float = 0.5  # beta_T, share of the previous heads in the blended target
        beta_decay_epochs: int = 1  # T, epochs until beta is reached
        reinitialize: bool = False  # reinitialize online and target heads every epoch
        recent_pairs: int = 0  # pairs of past batches that the estimates of partitions include
        amortizer_learning_rate: float = 1e-3
        rho: float = 0.0  # temperature regularizer rho / s ...
        rho_final: float = 0.0  # ... and its value in the last part of training
        rho_final_fraction: float = 0.25  # that part, as a fraction of the epochs

        def __post_init__(self) -> None:
            for name, choices in (
                ("amortization", AMORTIZATION_OBJECTIVES),
                ("partition_source", PARTITION_SOURCES),
            ):
                if getattr(self, name) not in choices:
                    raise ValueError(f"objective_args.{name} is {getattr(self, name)!r}; choose one of {choices}.")
            for name in ("ema_decay", "rho_final_fraction", "beta"):
                value = getattr(self, name)
                if not 0 <= value <= 1 or (name == "beta" and value == 1):
                    raise ValueError(f"objective_args.{name} must lie in 0 to 1, got {value}.")
            for name in ("online_steps", "online_every", "target_every", "beta_decay_epochs"):
                if getattr(self, name) < 1:
                    raise ValueError(f"objective_args.{name} must be at least 1, got {getattr(self, name)}.")
            for name in ("positive_weight", "regularizer", "recent_pairs"):
                if getattr(self, name) < 0:
                    raise ValueError(f"objective_args.{name} must be at least 0, got {getattr(self, name)}.")

    def __init__(
        self, config: AmorLIPConfig, arguments: Any, negatives: Negatives = "global", num_samples: int = 0
    ) -> None:
        super().__init__(config, arguments, negatives, num_samples)
        self.online = self.new_amortizer()
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.previous = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = self._new_optimizer()
        if arguments.recent_pairs:
            self.refuse_local_negatives("objective_args.recent_pairs")
            self.recent_images = EmbeddingRing(arguments.recent_pairs, config.projection_dim)
            self.recent_texts = EmbeddingRing(arguments.recent_pairs, config.projection_dim)
        self.any_recent = False
        self.partition_error = torch.nn.Buffer(torch.zeros(()))
        self.step, self.fresh, self.beta, self.rho = 0, True, 0.0, arguments.rho

    @property
    def amortizer(self) -> AmorLIPAmortizer | None:
        return None if self.arguments.partition_source == "batch" else self.target

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
        """Set the epoch's rho and beta; keep the target heads as previous heads, and reinitialize the others."""
        settings = self.arguments
        in_final_part = epoch >= num_epochs * (1 - settings.rho_final_fraction)
        self.rho = settings.rho_final if in_final_part else settings.rho
        # beta rises from 0 to beta_T along a half cosine; the first epoch has no previous heads to blend.
        progress = min(epoch / settings.beta_decay_epochs, 1)
        self.beta = settings.beta * (1 - math.cos(math.pi * progress)) / 2
        if epoch == 0:
            return
        self.previous.load_state_dict(self.target.state_dict())
        if settings.reinitialize:
            self.online.reset_parameters()
            broadcast_from_main_(list(self.online.parameters()))
            self.target.load_state_dict(self.online.state_dict())
            self.optimizer = self._new_optimizer()
            self.step, self.fresh = 0, True

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        batch = EmbeddedBatch(
            image_embeds,
            text_embeds,
            logit_scale,
            logit_bias,
            gather_texts(text_embeds, self.negatives),
            self.log_num_pairs(len(image_embeds), self.arguments.positive_weight),
        )
        source = self.arguments.partition_source
        fits = source != "batch" and self.step % self.arguments.online_every == 0
        if fits or source in ("blended", "batch"):
            self._estimate(batch)
        # Stage I: fit the online heads; the target heads follow.
        if fits:
            self.observe(self.online, image_embeds, text_embeds, batch.gathered_texts)
            self._fit_online(batch)
        if source != "batch" and self.step % self.arguments.target_every == 0:
            self._update_target()
        self.step += 1
        # Stage II: the encoders' loss against the amortized log-partitions.
        log_lambda = self._choose_log_partitions(batch, fits)
        loss = amortized_contrastive_loss(
            image_embeds, text_embeds, logit_scale, *log_lambda, **self._loss_options(batch)
        )
        # Rescale by the temperature, and regularize it.
        rescaled = loss / logit_scale.detach() + self.rho / logit_scale
        return ObjectiveOutput(
            rescaled, {"contrastive_loss": loss.detach(), "partition_error": self.partition_error.clone()}
        )

    def _loss_options(self, batch: EmbeddedBatch) -> dict[str, Any]:
        return {
            "logit_bias": batch.logit_bias,
            "positive_weight": self.arguments.positive_weight,
            "negatives": self.negatives,
            "gathered_texts": batch.gathered_texts,
        }

    def _predict(self, heads: AmorLIPAmortizer, batch: EmbeddedBatch) -> list[Tensor]:
        """Return the log-partitions [N] that heads predict for both modalities, as sums over pairs."""
        predictions = heads(batch.image_embeds, batch.text_embeds, batch.logit_scale, batch.logit_bias)
        return [prediction + batch.log_count for prediction in predictions]

    @torch.no_grad()
    def _estimate(self, batch: EmbeddedBatch) -> None:
        """Set the batch estimates of the log-partitions and their blend with the previous heads (Eq. 12)."""
        log_z = list(
            log_partitions(batch.image_embeds, batch.text_embeds, batch.logit_scale, **self._loss_options(batch))
        )
        if self.arguments.recent_pairs:
            log_z = self._include_recent(log_z, batch)
            self._store_recent(batch)
        batch.log_z = batch.log_targets = log_z
        if self.beta > 0:
            heads = self.previous if self.arguments.reinitialize else self.target
            batch.log_targets = [
                blend_log_targets(previous, estimate, self.beta)
                for previous, estimate in zip(self._predict(heads, batch), log_z, strict=True)
            ]

    def _include_recent(self, log_z: list[Tensor], batch: EmbeddedBatch) -> list[Tensor]:
        """Return estimates from the batch and the recent pairs, scaled to sums over as many pairs as the batch's."""
        if not self.any_recent:
            return log_z
        log_total = math.log(math.exp(batch.log_count) + self.arguments.recent_pairs)
        scale = batch.logit_scale.float()
        bias = torch.zeros_like(scale) if batch.logit_bias is None else batch.logit_bias.float()
        sides = (
            (batch.image_embeds.float(), self.recent_texts.get_buffer("embeds")),
            (batch.text_embeds.float(), self.recent_images.get_buffer("embeds")),
        )
        with torch.autocast(batch.image_embeds.device.type, enabled=False):
            log_recent = [log_sum_exps(embeds, recent, scale, bias, 0, 1.0, 1024)[0] for embeds, recent in sides]
        return [torch.logaddexp(*both) + (batch.log_count - log_total) for both in zip(log_z, log_recent, strict=True)]

    def _store_recent(self, batch: EmbeddedBatch) -> None:
        """Push the embeddings of all processes into the rings of recent pairs."""
        texts = batch.gathered_texts
        images = batch.image_embeds if texts is None else all_gather(batch.image_embeds)
        self.recent_images.push(images.detach().float())
        self.recent_texts.push((batch.text_embeds if texts is None else texts).detach().float())
        self.any_recent = True

    def _fit_online(self, batch: EmbeddedBatch) -> None:
        """Take `online_steps` optimizer steps of the amortization objective."""
        if self.fresh:
            self._start_heads(batch)
        if self.optimizer is not None:
            fit(self.online, self.optimizer, lambda: self._amortization_loss(batch), self.arguments.online_steps)

    def _start_heads(self, batch: EmbeddedBatch) -> None:
        """Move fresh heads to the mean of their first targets."""
        assert batch.log_targets is not None
        if self.online.observes:
            self.online.reset_parameters()
        with torch.no_grad():
            means = [values.mean() for values in (*batch.log_targets, *self._predict(self.online, batch))]
        all_reduce_mean_(means)
        means = [mean - batch.log_count for mean in means]
        self.online.start_at(means[:2], means[2:])
        self.target.load_state_dict(self.online.state_dict())
        self.fresh = False

    def _amortization_loss(self, batch: EmbeddedBatch) -> Tensor:
        assert batch.log_z is not None and batch.log_targets is not None
        losses = [
            amortization_loss(
                prediction,
                target,
                objective=self.arguments.amortization,
                log_z_batch=estimate,
                regularizer=self.arguments.regularizer,
            )
            for prediction, target, estimate in zip(
                self._predict(self.online, batch), batch.log_targets, batch.log_z, strict=True
            )
        ]
        return losses[0] + losses[1]

    @torch.no_grad()
    def _update_target(self) -> None:
        """Move the target heads towards the online heads (Eq. 11)."""
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 1 - self.arguments.ema_decay)
        for target_buffer, online_buffer in zip(self.target.buffers(), self.online.buffers(), strict=True):
            target_buffer.copy_(online_buffer)

    @torch.no_grad()
    def _choose_log_partitions(self, batch: EmbeddedBatch, fits: bool) -> list[Tensor]:
        """Return the log-partitions [N] per modality that the encoders' loss divides by."""
        source = self.arguments.partition_source
        if source == "target_network":
            log_lambda = self._predict(self.target, batch)
        elif source == "online":
            log_lambda = self._predict(self.online, batch)
        else:
            estimates = batch.log_targets if source == "blended" else batch.log_z
            assert estimates is not None
            log_lambda = estimates
        if fits:
            assert batch.log_z is not None
            heads = log_lambda if source == "target_network" else self._predict(self.target, batch)
            errors = torch.stack([head - estimate for head, estimate in zip(heads, batch.log_z, strict=True)])
            mean_square = errors.square().mean()
            all_reduce_mean_([mean_square])
            self.partition_error.copy_(mean_square.sqrt())
            # However far off a head may be, no pair's weight can overflow, not even in half precision.
            log_lambda = [torch.maximum(a, b - MAX_LOG_RATIO) for a, b in zip(log_lambda, batch.log_z, strict=True)]
        return log_lambda

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        if not (parameters := list(self.online.parameters())):
            return None  # a queue has nothing to learn
        return torch.optim.Adam(parameters, lr=self.arguments.amortizer_learning_rate, fused=True)

    def get_extra_state(self) -> dict[str, Any]:
        optimizer = self.optimizer and self.optimizer.state_dict()
        return {"optimizer": optimizer, **{name: getattr(self, name) for name in SAVED_ATTRIBUTES}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        for name in SAVED_ATTRIBUTES:
            setattr(self, name, state[name])
