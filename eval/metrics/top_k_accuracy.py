"""Accuracy within the k most likely classes."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def top_k_accuracy(predictions: ArrayLike, references: ArrayLike, k: int = 1) -> float:
    """Return the fraction of references [n] among the first k of the predictions [n, at least k], best first."""
    return float((np.asarray(predictions)[:, :k] == np.asarray(references)[:, None]).any(1).mean())


class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list, k: int = 1) -> dict[str, float]:
        return {"top_k_accuracy": top_k_accuracy(predictions, references, k)}
