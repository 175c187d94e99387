"""Zero-shot classification by prompt ensembles (Radford et al. 2021, Section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .encode import encode_texts


def build_classifier(model, processor, classes: list[str], templates: list[str], batch_size: int = 256) -> Tensor:
    """Class embeddings [C, d]: each template's embedding normalised, their mean normalised again."""
    prompts = (template.format(name) for template in templates for name in classes)
    embeds = encode_texts(model, processor, prompts, batch_size).view(len(templates), len(classes), -1)
    return torch.nn.functional.normalize(embeds.mean(0), dim=-1)


def top_classes(image_embeds: Tensor, classifier: Tensor, k: int, tile_size: int = 1024) -> Tensor:
    """The k likeliest classes of each image, best first: [I, d], [C, d] -> [I, k]; scores of one tile at a time."""
    k = min(k, len(classifier))
    return torch.cat([(tile @ classifier.T).topk(k).indices for tile in image_embeds.split(tile_size)])


def zero_shot_metrics(image_embeds: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, float]:
    """`acc1` and `acc5` as fractions; labels [I] index the classifier's rows."""
    hits = top_classes(image_embeds, classifier, 5) == labels[:, None]
    return {"acc1": hits[:, 0].double().mean().item(), "acc5": hits.any(1).double().mean().item()}
