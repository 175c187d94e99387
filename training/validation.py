"""A slice of the pairs that training never sees, and how well they are told apart: cheap, to be looked at often."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from training.config import AugmentationConfig, PretrainConfig
from training.data.collate import Collator
from training.data.dataset import PairDataset
from training.data.mixture import Mixture
from training.objectives.clip import CLIPObjective


PLAIN = AugmentationConfig(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])


def held_out(number_of_pairs: int, validation_samples: int) -> np.ndarray:
    """Indices of the pairs that are left out, the same whatever the seed: int array, in order."""
    return np.sort(np.random.default_rng(0).choice(number_of_pairs, validation_samples, replace=False))


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    encoder: nn.Module,
    pairs: Mixture,
    arguments: PretrainConfig,
    image_size: int,
    collator: Collator,
) -> float:
    """InfoNCE over all held-out pairs, whatever the objective, without augmentation; every process takes all."""
    plain = dataclasses.replace(arguments, augmentation=PLAIN, keywords_column=None, alternative_captions_column=None)
    keys = [(0, int(index)) for index in held_out(len(pairs), arguments.validation_samples)]
    loader = DataLoader(
        PairDataset(pairs, plain, image_size, replacements=[index for _, index in keys]),
        arguments.per_device_train_batch_size,
        sampler=keys,
        collate_fn=collator,
        generator=torch.Generator(),
    )
    encoder.eval()
    encoded = []
    for batch in loader:
        inputs = {name: batch[name].to(accelerator.device) for name in ("pixel_values", "input_ids", "attention_mask")}
        with accelerator.autocast():
            encoded.append(encoder(**inputs))
    images, texts = (torch.cat([part[k] for part in encoded]) for k in (0, 1))
    scale, bias = encoded[0][2:]
    loss = CLIPObjective(None, None, negatives="local")(images, texts, scale, bias).loss
    encoder.train()
    return loss.item()
