"""Image-text retrieval, exact, with any number of captions an image; and WinoGAViL's choice of images for a cue."""

from __future__ import annotations

import torch
from torch import Tensor


KS = (1, 5, 10)


def recall_hits(
    queries: Tensor,
    gallery: Tensor,
    query_groups: Tensor,
    gallery_groups: Tensor,
    penalty: Tensor | None = None,
    tile_size: int = 1024,
) -> Tensor:
    """Whether any gallery item of a query's group is among its best k: bool [Q, len(KS)]; one tile of scores at a time.

    Args:
        queries: [Q, d], gallery: [G, d], unit norm. query_groups: [Q], gallery_groups: [G]; equal values match.
        penalty: [G], taken off every query's cosine similarities with the gallery.
        tile_size: queries scored at a time.
    """
    deepest = min(max(KS), len(gallery))
    found = []
    for tile, groups in zip(queries.split(tile_size), query_groups.split(tile_size), strict=True):
        scores = tile @ gallery.T
        best = (scores if penalty is None else scores - penalty).topk(deepest).indices
        found.append(gallery_groups[best] == groups[:, None])
    hits = torch.cat(found)
    return torch.stack([hits[:, :k].any(1) for k in KS], dim=1)


def retrieval_metrics(to_text: Tensor, to_image: Tensor) -> dict[str, float]:
    """Recalls of both directions from `recall_hits`, named as CLIP_benchmark does.

    `text_retrieval_recall@k` has images as queries, `image_retrieval_recall@k` captions; `mean_recall@1` is their mean.
    """
    metrics = {
        f"{name}_recall@{k}": hits[:, i].double().mean().item()
        for name, hits in (("text_retrieval", to_text), ("image_retrieval", to_image))
        for i, k in enumerate(KS)
    }
    metrics["mean_recall@1"] = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
    return metrics


def winogavil_prompt(cue: str) -> str:
    """ "A cue" or "An cue", as WinoGAViL's evaluation in DataComp words it."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def choose(image_embeds: Tensor, text_embed: Tensor, number: int) -> list[int]:
    """The `number` images that are nearest to a text: [I, d], [d] -> indices."""
    return (image_embeds @ text_embed).topk(number).indices.tolist()
