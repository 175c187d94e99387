"""Mean over instances of the Jaccard score of two sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import datasets
import evaluate
import numpy as np


def jaccard_scores(predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]]) -> np.ndarray:
    """Return each instance's Jaccard score [n] of the predicted and the true set of numbers."""
    pairs = [(set(predicted), set(true)) for predicted, true in zip(predictions, references, strict=True)]
    return np.array([len(predicted & true) / len(predicted | true) for predicted, true in pairs])


def jaccard(predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]]) -> float:
    """Return the mean of `jaccard_scores`."""
    return float(jaccard_scores(predictions, references).mean())


class Jaccard(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"jaccard": jaccard(predictions, references)}
