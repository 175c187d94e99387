"""CLIP's InfoNCE loss, the baseline, and its decoupled form DCL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modeling_amorlip.loss_amorlip import log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput


class CLIPObjective(ContrastiveObjective):
    """Average the cross-entropies of both directions, -l_ii + log sum_j exp(l_ij) (Radford et al. 2021)."""

    positive_weight: ClassVar[float] = 1.0

    @dataclass
    class Arguments:
        """No settings."""

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        log_z_image, log_z_text = log_partitions(
            image_embeds,
            text_embeds,
            logit_scale,
            logit_bias=logit_bias,
            positive_weight=self.positive_weight,
            negatives=self.negatives,
        )
        positives = positive_logits(image_embeds, text_embeds, logit_scale, logit_bias)
        return ObjectiveOutput(((log_z_image + log_z_text) / 2 - positives).mean())


class DCLObjective(CLIPObjective):
    """Leave the positive pair out of the denominator (decoupled contrastive learning, Yeh et al. 2022)."""

    positive_weight = DECOUPLED
