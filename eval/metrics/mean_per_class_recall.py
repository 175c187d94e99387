"""Recall, averaged over classes (balanced accuracy)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def mean_per_class_recall(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return the mean recall of predicted and true classes [n], over classes that occur in the references."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    total = np.bincount(references)
    correct = np.bincount(references[predictions == references], minlength=len(total))
    return float((correct[total > 0] / total[total > 0]).mean())


class MeanPerClassRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"mean_per_class_recall": mean_per_class_recall(predictions, references)}
