"""Accuracy within the k most likely classes, in the group where it is lowest."""

from __future__ import annotations

from collections.abc import Collection

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def worst_group_accuracy(
    predictions: ArrayLike, references: ArrayLike, groups: ArrayLike, k: int = 1, ignored: Collection[int] = ()
) -> float:
    """Return the lowest accuracy of any group.

    Args:
        predictions: Classes [n, at least k], best first.
        references: True classes [n].
        groups: Group of each sample [n].
        k: Predictions that count.
        ignored: Groups that do not count.
    """
    hits = (np.asarray(predictions)[:, :k] == np.asarray(references)[:, None]).any(1)
    groups = np.asarray(groups)
    return float(min(hits[groups == group].mean() for group in np.unique(groups) if group not in ignored))


class WorstGroupAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(
        self, predictions: list, references: list, groups: list, k: int = 1, ignored: Collection[int] = ()
    ) -> dict[str, float]:
        return {"worst_group_accuracy": worst_group_accuracy(predictions, references, groups, k, ignored)}
