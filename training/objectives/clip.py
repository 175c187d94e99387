"""CLIP: InfoNCE over the batch (Radford et al. 2021), the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from modeling_amorlip.loss_amorlip import log_partitions, positive_logits

from .base import ContrastiveObjective, ObjectiveOutput


class CLIPObjective(ContrastiveObjective):
    """Mean of both directions' cross-entropies, -l_ii + log sum_j exp(l_ij)."""

    @dataclass
    class Arguments:
        """CLIP has no settings of its own."""

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        log_z_image, log_z_text = log_partitions(
            image_embeds, text_embeds, logit_scale,
            logit_bias=logit_bias, positive_weight=1.0, negatives=self.negatives,
        )  # fmt: skip
        positives = positive_logits(image_embeds, text_embeds, logit_scale, logit_bias)
        return ObjectiveOutput(((log_z_image + log_z_text) / 2 - positives).mean())
