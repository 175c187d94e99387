"""WinoGAViL: the choice of a cue's images among candidates (Bitton et al. 2022)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.data import TaskData
from eval.encoding import Encoder, encode_samples
from eval.evaluators.scored import Scored
from eval.metrics.jaccard import jaccard_scores


SIZES = {"5-6": (5, 6), "10-12": (10, 12)}
"""Numbers of candidates that a metric of its own is taken over."""


def choose(image_embeds: Tensor, text_embed: Tensor, number: int) -> list[int]:
    """Return the indices of the `number` images that are nearest to a text: [I, d], [d]."""
    return (image_embeds @ text_embed).topk(number).indices.tolist()


def evaluate_winogavil(encoder: Encoder, data: TaskData) -> Scored:
    """Score a WinoGAViL task by cosine: as many images are chosen for a cue as it has associations."""
    samples = encode_samples(encoder, data)
    with encoder.shard.agreement():
        counts = samples.image_counts.tolist()
        flags = samples.right_images.split(counts)
        right = [torch.nonzero(flag).flatten().tolist() for flag in flags]
        instances = zip(samples.image_embeds.split(counts), samples.text_embeds, right, strict=True)
        chosen = [choose(images, cue, len(associations)) for images, cue, associations in instances]
        scores, sizes = jaccard_scores(chosen, right), samples.image_counts.numpy()

    def metrics(rows: np.ndarray) -> dict[str, float]:
        values = {"jaccard_score": float(scores[rows].mean())}
        for name, numbers in SIZES.items():
            part = rows[np.isin(sizes[rows], numbers)]
            if len(part):
                values[f"jaccard_score_{name}"] = float(scores[part].mean())
        return values

    return Scored(len(samples), {"cosine": metrics}, unreadable=samples.unreadable)
