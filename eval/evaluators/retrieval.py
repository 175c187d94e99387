"""Exact image-text retrieval, with any number of captions per image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.data import TaskData
from eval.encoding import Encoder, encode_samples
from eval.evaluators.scored import Metrics, Scored
from eval.scoring import SinkhornSettings, log_partition_corrections


KS = (1, 5, 10)


def recall_hits(
    queries: Tensor,
    gallery: Tensor,
    query_groups: Tensor,
    gallery_groups: Tensor,
    correction: Tensor | None = None,
    tile_size: int = 1024,
) -> Tensor:
    """Return whether any gallery item of a query's group is among its best k: bool [Q, len(KS)].

    Args:
        queries: [Q, d], unit norm.
        gallery: [G, d], unit norm.
        query_groups: [Q]; a query matches the gallery items with its value.
        gallery_groups: [G].
        correction: [G], subtracted from every query's cosine similarities with the gallery.
        tile_size: Queries scored at a time.
    """
    deepest = min(max(KS), len(gallery))
    matches = []
    for tile, groups in zip(queries.split(tile_size), query_groups.split(tile_size), strict=True):
        scores = tile @ gallery.T
        best = (scores if correction is None else scores - correction).topk(deepest).indices
        matches.append(gallery_groups[best] == groups[:, None])
    hits = torch.cat(matches)
    return torch.stack([hits[:, :k].any(1) for k in KS], dim=1)


def retrieval_metrics(to_text: Tensor, to_image: Tensor) -> dict[str, float]:
    """Return the recalls of both directions from `recall_hits`, named as in CLIP_benchmark.

    `text_retrieval_recall@k` has images as queries, `image_retrieval_recall@k` captions; `mean_recall@1` is their mean.
    """
    metrics = {
        f"{name}_recall@{k}": hits[:, i].double().mean().item()
        for name, hits in (("text_retrieval", to_text), ("image_retrieval", to_image))
        for i, k in enumerate(KS)
    }
    metrics["mean_recall@1"] = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
    return metrics


def evaluate_retrieval(
    encoder: Encoder, data: TaskData, scorings: tuple[str, ...], *, sinkhorn: SinkhornSettings | None = None
) -> Scored:
    """Score a retrieval task's images and captions against each other.

    Args:
        scorings: Names in `SCORINGS`.
        sinkhorn: Settings of Sinkhorn scoring.
    """
    samples = encode_samples(encoder, data)
    with encoder.shard.agreement():
        images, texts = samples.image_embeds, samples.text_embeds
        image_groups = torch.arange(len(samples))
        text_groups = image_groups.repeat_interleave(samples.text_counts)
        of_texts = log_partition_corrections(encoder.model, scorings, images, texts, "text", sinkhorn=sinkhorn)
        of_images = log_partition_corrections(encoder.model, scorings, texts, images, "image", sinkhorn=sinkhorn)
        metrics = {
            scoring: _make_metrics(
                recall_hits(images, texts, image_groups, text_groups, of_texts[scoring]),
                recall_hits(texts, images, text_groups, image_groups, of_images[scoring]),
                text_groups,
            )
            for scoring in of_texts
        }
    return Scored(len(samples), metrics, unreadable=samples.unreadable)


def _make_metrics(to_text: Tensor, to_image: Tensor, text_groups: Tensor) -> Metrics:
    """Return metrics over chosen images and their captions."""

    def metrics(rows: np.ndarray) -> dict[str, float]:
        counts = torch.from_numpy(np.bincount(rows, minlength=len(to_text)))
        captions = to_image.repeat_interleave(counts[text_groups], dim=0)
        return retrieval_metrics(to_text[torch.from_numpy(rows)], captions)

    return metrics
