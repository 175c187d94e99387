"""Accuracy within the k likeliest classes."""

import datasets
import evaluate
import numpy as np


def top_k_accuracy(predictions, references, k=1):
    """ProcessShard of [n] references among the first k of predictions [n, at least k], best first."""
    return float((np.asarray(predictions)[:, :k] == np.asarray(references)[:, None]).any(1).mean())


class TopKAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references, k=1):
        return {"top_k_accuracy": top_k_accuracy(predictions, references, k)}
