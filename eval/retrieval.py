"""Image-text retrieval, exact, with any number of captions an image."""

from __future__ import annotations

import torch
from torch import Tensor


def recalls(
    queries: Tensor,
    gallery: Tensor,
    query_groups: Tensor,
    gallery_groups: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    tile_size: int = 1024,
) -> dict[int, float]:
    """Recall at k as fractions: a query counts when any gallery item of its group is among its top k.

    Args:
        queries: [Q, d], gallery: [G, d], unit norm. query_groups: [Q], gallery_groups: [G]; equal values match.
        tile_size: queries scored at a time.
    """
    deepest = min(max(ks), len(gallery))
    found = [
        gallery_groups[(tile @ gallery.T).topk(deepest).indices] == groups[:, None]
        for tile, groups in zip(queries.split(tile_size), query_groups.split(tile_size), strict=True)
    ]
    hits = torch.cat(found)
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, image_groups: Tensor, text_groups: Tensor
) -> dict[str, float]:
    """Both directions, named as CLIP_benchmark does: `text_retrieval_recall@k` has images as queries."""
    directions = {
        "text_retrieval": recalls(image_embeds, text_embeds, image_groups, text_groups),
        "image_retrieval": recalls(text_embeds, image_embeds, text_groups, image_groups),
    }
    return {f"{name}_recall@{k}": value for name, values in directions.items() for k, value in values.items()}
