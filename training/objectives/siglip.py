"""SigLIP (Zhai et al. 2023): every pair is a binary question of its own, without any partition function."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modeling_amorlip.loss_amorlip import sigmoid_contrastive_loss
from training.objectives.base import ContrastiveObjective, ObjectiveOutput


class SigLIPObjective(ContrastiveObjective):
    """Pairwise sigmoid loss with a learned scale and bias, which start at 10 and -10."""

    model_defaults = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}

    @dataclass
    class Arguments:
        """No settings."""

    def __init__(self, config, arguments, negatives="global", num_samples=0):
        super().__init__(config, arguments, negatives, num_samples)
        if config.logit_bias_init_value is None:
            raise ValueError("siglip needs a model with a logit bias: set logit_bias_init_value, as to -10.")

    def forward(self, image_embeds, text_embeds, logit_scale, logit_bias=None, sample_ids=None) -> ObjectiveOutput:
        loss = sigmoid_contrastive_loss(
            image_embeds, text_embeds, logit_scale, logit_bias=logit_bias, negatives=self.negatives
        )
        return ObjectiveOutput(loss)
