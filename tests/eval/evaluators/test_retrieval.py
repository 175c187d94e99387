"""Retrieval against a brute-force ranking in float64."""

import numpy as np
import pytest
import torch

from eval.evaluators.retrieval import recall_hits, retrieval_metrics


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.parametrize("tile_size", [1, 7, 1024])
def test_recall_with_several_captions_per_image(tile_size):
    images, texts = unit(60, 8), unit(300, 8, seed=1)
    image_groups, text_groups = torch.arange(60), torch.arange(300) % 60
    scores = (images.double() @ texts.double().T).numpy()
    hits = []
    for queries, gallery, q, g, matrix in (
        (images, texts, image_groups, text_groups, scores),
        (texts, images, text_groups, image_groups, scores.T),
    ):
        hits.append(recall_hits(queries, gallery, q, g, tile_size=tile_size))
        for i, k in enumerate((1, 5, 10)):
            best = np.argsort(-matrix, axis=1)[:, :k]
            expected = [(g.numpy()[row] == q[n].item()).any() for n, row in enumerate(best)]
            assert hits[-1][:, i].tolist() == expected
    metrics = retrieval_metrics(*hits)
    assert metrics["image_retrieval_recall@10"] == hits[1][:, 2].double().mean().item()
    assert metrics["mean_recall@1"] == np.mean([metrics[f"{n}_retrieval_recall@1"] for n in ("text", "image")])
