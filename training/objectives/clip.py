"""The objectives of one batch: CLIP's InfoNCE, the baseline, and its decoupled form DCL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modeling_amorlip.loss_amorlip import log_partitions, positive_logits
from training.objectives.base import DECOUPLED, ContrastiveObjective, ObjectiveOutput


class CLIPObjective(ContrastiveObjective):
    """Mean of both directions' cross-entropies, -l_ii + log sum_j exp(l_ij) (Radford et al. 2021)."""

    positive_weight: ClassVar[float] = 1.0

    @dataclass
    class Arguments:
        """No settings."""

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
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
    """Decoupled contrastive learning (Yeh et al. 2022): the positive pair is left out of the denominator."""

    positive_weight = DECOUPLED
