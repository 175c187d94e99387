"""F1 score, averaged over the classes that occur (as in WILDS)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def macro_f1(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return the mean F1 score of predicted and true classes [n], over classes that occur in the references."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    num_classes = max(predictions.max(), references.max()) + 1
    true = np.bincount(references, minlength=num_classes)
    predicted = np.bincount(predictions, minlength=num_classes)
    correct = np.bincount(references[predictions == references], minlength=num_classes)
    return float((2 * correct / np.maximum(true + predicted, 1))[true > 0].mean())


class MacroF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}
