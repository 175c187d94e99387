"""Mean over instances of the Jaccard score of two sets."""

import datasets
import evaluate
import numpy as np


def jaccard(predictions, references):
    """Lists of [n] collections of numbers: those chosen and those that are right."""
    pairs = [(set(chosen), set(right)) for chosen, right in zip(predictions, references, strict=True)]
    return float(np.mean([len(chosen & right) / len(chosen | right) for chosen, right in pairs]))


class Jaccard(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {"jaccard": jaccard(predictions, references)}
