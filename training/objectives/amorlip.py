"""AmorLIP (Sun et al., NeurIPS 2025, Algorithm 1): learn the partition functions, then train against them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from modeling_amorlip.amortizer_amorlip import AmorLIPAmortizer, EmbeddingRing
from modeling_amorlip.distributed_amorlip import all_gather, all_reduce_mean_, broadcast_from_main_
from modeling_amorlip.loss_amorlip import (
    AMORTIZATION_OBJECTIVES,
    amortization_loss,
    amortized_contrastive_loss,
    blend_log_targets,
    gather_texts,
    log_partitions,
)
from modeling_amorlip.tiles_amorlip import log_sum_exps
from training.objectives.base import ContrastiveObjective, ObjectiveOutput, fit


LARGEST_LOG_RATIO = 10.0
"""Nats that a log-partition may lie under its batch estimate. A batch of N is off by log N at most."""
SAVED = ("step", "fresh", "beta", "rho", "any_recent")
"""What checkpoints hold beside tensors."""
PARTITION_SOURCES = ("target_network", "blended", "online", "batch")


class AmorLIPObjective(ContrastiveObjective):
    """
    Alternates between fitting the amortizer (Stage I) and training the encoders against it (Stage II).

    Three copies of the heads: `online` is fitted by Adam, `target` follows it as a moving average, `previous` is the
    target as it stood when the epoch before ended; where heads are not fitted anew, the target itself takes its place.
    Heads predict the logarithm of a *mean*; adding `log_count` turns it into the sum over pairs that `log_partitions`
    returns. Fresh heads start at the mean of their first targets: where the paper lets them drift there, a start at 0
    would divide by a wrong constant for hundreds of steps.
    """

    @dataclass
    class Arguments:
        """
        Settings, with the paper's symbols.

        Defaults are what did best on the development set of the README's study; the paper's own settings stand in
        training/recipes/cc3m_rn50.yaml and cc12m_vit_b32.yaml.
        """

        amortization: str = "conjugate"
        regularizer: float = 0.1  # weight of l2_log in kl, kl_sym and js
        positive_weight: float = 1e-3  # c, weight of the positive pair in the partition sums
        partition_source: str = "blended"  # what Stage II divides by; batch: no amortization
        online_steps: int = 3  # T_lambda, Adam steps a fit
        online_every: int = 1  # T_online, steps between fits
        target_every: int = 2  # T_target, steps between updates of the target heads
        ema_decay: float = 0.99  # alpha
        beta: float = 0.5  # beta_T, share of the previous heads in the blended target
        beta_decay_epochs: int = 1  # T, epochs until beta is reached
        reinitialize: bool = False  # fresh online and target heads every epoch
        recent_pairs: int = 0  # pairs of past batches that estimates of the partitions take in, beside the batch
        amortizer_learning_rate: float = 1e-3
        rho: float = 0.0  # temperature regulariser rho / s ...
        rho_final: float = 0.0  # ... and its value in the last part of training
        rho_final_fraction: float = 0.25  # that part, as a fraction of the epochs

        def __post_init__(self):
            for name, known in (
                ("amortization", AMORTIZATION_OBJECTIVES),
                ("partition_source", PARTITION_SOURCES),
            ):
                if getattr(self, name) not in known:
                    raise ValueError(f"objective_args.{name} is {getattr(self, name)!r}; choose one of {known}.")
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

    def __init__(self, config, arguments, negatives="global", num_samples=0):
        super().__init__(config, arguments, negatives, num_samples)
        self.online = self.new_amortizer()
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.previous = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = self._new_optimizer()
        if arguments.recent_pairs:
            self.refuse_local_negatives("objective_args.recent_pairs")
            self.recent_images, self.recent_texts = (
                EmbeddingRing(arguments.recent_pairs, config.projection_dim) for _ in range(2)
            )
        self.any_recent = False
        self.register_buffer("partition_error", torch.zeros(()))
        self.step, self.fresh, self.beta, self.rho = 0, True, 0.0, arguments.rho

    @property
    def amortizer(self) -> AmorLIPAmortizer | None:
        return None if self.arguments.partition_source == "batch" else self.target

    def on_epoch_start(self, epoch: int, num_epochs: int) -> None:
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

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        settings, source = self.arguments, self.arguments.partition_source
        texts = gather_texts(text_embeds, self.negatives)
        batch = dict(
            logit_bias=logit_bias,
            positive_weight=settings.positive_weight,
            negatives=self.negatives,
            gathered_texts=texts,
        )
        log_count = self.log_num_pairs(len(image_embeds), settings.positive_weight)

        def predict(heads: AmorLIPAmortizer) -> list[torch.Tensor]:
            return [head + log_count for head in heads(image_embeds, text_embeds, logit_scale, logit_bias)]

        fits = source != "batch" and self.step % settings.online_every == 0
        if fits or source in ("blended", "batch"):
            # 1. Batch estimates of the log-partitions and their blend with the previous epoch's heads, no gradient.
            with torch.no_grad():
                log_z = log_partitions(image_embeds, text_embeds, logit_scale, **batch)
                if settings.recent_pairs:
                    log_z = self._with_recent(log_z, image_embeds, text_embeds, logit_scale, logit_bias, log_count)
                    self._remember(image_embeds, text_embeds, texts)
                log_targets = log_z
                if self.beta > 0:
                    known = self.previous if settings.reinitialize else self.target
                    log_targets = [
                        blend_log_targets(previous, estimate, self.beta)
                        for previous, estimate in zip(predict(known), log_z, strict=True)
                    ]
        # 2. Stage I: fit the online heads; the target heads follow.
        if fits:
            self.observe(self.online, image_embeds, text_embeds, texts)
            self._fit_online(predict, log_z, log_targets, log_count)
        if source != "batch" and self.step % settings.target_every == 0:
            self._update_target()
        self.step += 1
        # 3. Stage II: the encoders' loss against the amortized log-partitions.
        with torch.no_grad():
            if source in ("target_network", "online"):
                log_lambda = predict(self.target if source == "target_network" else self.online)
            else:
                log_lambda = log_targets if source == "blended" else log_z
            if fits:
                heads = log_lambda if source == "target_network" else predict(self.target)
                errors = torch.stack([head - estimate for head, estimate in zip(heads, log_z, strict=True)])
                mean_square = errors.square().mean()
                all_reduce_mean_([mean_square])
                self.partition_error.copy_(mean_square.sqrt())
                # However far off a head may be, no pair's weight can overflow, not even in half precision.
                log_lambda = [torch.maximum(a, b - LARGEST_LOG_RATIO) for a, b in zip(log_lambda, log_z, strict=True)]
        loss = amortized_contrastive_loss(image_embeds, text_embeds, logit_scale, *log_lambda, **batch)
        # 4. Rescale by the temperature, and regularise it.
        rescaled = loss / logit_scale.detach() + self.rho / logit_scale
        return ObjectiveOutput(
            rescaled, {"contrastive_loss": loss.detach(), "partition_error": self.partition_error.clone()}
        )

    def _with_recent(self, log_z, image_embeds, text_embeds, scale, bias, log_count: float) -> list[torch.Tensor]:
        """Estimates from the batch and the recent pairs together, as sums over as many pairs as the batch's."""
        if not self.any_recent:
            return log_z
        log_total = math.log(math.exp(log_count) + self.arguments.recent_pairs)
        scale, bias = scale.float(), torch.zeros_like(scale) if bias is None else bias.float()
        with torch.autocast(image_embeds.device.type, enabled=False):
            log_recent = [
                log_sum_exps(embeds.float(), ring.embeds, scale, bias, 0, 1.0, 1024)[0]
                for embeds, ring in ((image_embeds, self.recent_texts), (text_embeds, self.recent_images))
            ]
        return [torch.logaddexp(*both) + (log_count - log_total) for both in zip(log_z, log_recent, strict=True)]

    def _remember(self, image_embeds, text_embeds, texts) -> None:
        images = image_embeds if texts is None else all_gather(image_embeds)
        self.recent_images.push(images.detach().float())
        self.recent_texts.push((text_embeds if texts is None else texts).detach().float())
        self.any_recent = True

    def _fit_online(self, predict, log_z, log_targets, log_count: float) -> None:
        settings = self.arguments
        if self.fresh:
            if self.online.observes:
                self.online.reset_parameters()
            with torch.no_grad():
                means = [values.mean() for values in (*log_targets, *predict(self.online))]
            all_reduce_mean_(means)
            self.online.start_at([mean - log_count for mean in means[:2]], [mean - log_count for mean in means[2:]])
            self.target.load_state_dict(self.online.state_dict())
            self.fresh = False
        if self.optimizer is None:
            return

        def loss() -> torch.Tensor:
            return sum(
                amortization_loss(
                    prediction,
                    target,
                    objective=settings.amortization,
                    log_z_batch=estimate,
                    regularizer=settings.regularizer,
                )
                for prediction, target, estimate in zip(predict(self.online), log_targets, log_z, strict=True)
            )

        fit(self.online, self.optimizer, loss, settings.online_steps)

    @torch.no_grad()
    def _update_target(self) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 1 - self.arguments.ema_decay)
        for target, online in zip(self.target.buffers(), self.online.buffers(), strict=True):
            target.copy_(online)

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        if not (parameters := list(self.online.parameters())):
            return None  # a queue has nothing to learn
        return torch.optim.Adam(parameters, lr=self.arguments.amortizer_learning_rate, fused=True)

    def get_extra_state(self) -> dict:
        optimizer = self.optimizer and self.optimizer.state_dict()
        return {"optimizer": optimizer, **{name: getattr(self, name) for name in SAVED}}

    def set_extra_state(self, state: dict) -> None:
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        for name in SAVED:
            setattr(self, name, state[name])
