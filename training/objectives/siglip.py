"""SigLIP (Zhai et al. 2023, arXiv 2303.15343): a binary classification of every pair, without partition functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.loss_amorlip import Negatives, sigmoid_contrastive_loss
from training.objectives.base import ContrastiveObjective, ObjectiveOutput


class SigLIPObjective(ContrastiveObjective):
    """Pairwise sigmoid loss with a learned logit scale and bias, which start at 10 and -10."""

    model_defaults = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}

    @dataclass
    class Arguments:
        """No settings."""

    def __init__(self, config: AmorLIPConfig, arguments: Any, negatives: Negatives = "global", num_samples: int = 0):
        super().__init__(config, arguments, negatives, num_samples)
        if config.logit_bias_init_value is None:
            raise ValueError("siglip needs a model with a logit bias: set logit_bias_init_value, for example to -10.")

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        loss = sigmoid_contrastive_loss(
            image_embeds, text_embeds, logit_scale, logit_bias=logit_bias, negatives=self.negatives
        )
        return ObjectiveOutput(loss)
