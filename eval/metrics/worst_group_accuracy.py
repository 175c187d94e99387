"""Accuracy within the k likeliest classes, in the group where it is lowest."""

import datasets
import evaluate
import numpy as np


def worst_group_accuracy(predictions, references, groups, k=1, ignored=()):
    """Predictions [n, at least k], references [n] and the group of each [n], of which `ignored` do not count."""
    hits = (np.asarray(predictions)[:, :k] == np.asarray(references)[:, None]).any(1)
    groups = np.asarray(groups)
    return float(min(hits[groups == group].mean() for group in np.unique(groups) if group not in ignored))


class WorstGroupAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references, groups, k=1, ignored=()):
        return {"worst_group_accuracy": worst_group_accuracy(predictions, references, groups, k, ignored)}
