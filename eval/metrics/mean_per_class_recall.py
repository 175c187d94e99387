"""Mean over classes of the share of a class that was found (balanced accuracy)."""

import datasets
import evaluate
import numpy as np


def mean_per_class_recall(predictions, references):
    """Predicted and true classes [n]; classes that do not occur in the references do not count."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    total = np.bincount(references)
    found = np.bincount(references[predictions == references], minlength=len(total))
    return float((found[total > 0] / total[total > 0]).mean())


class MeanPerClassRecall(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {"mean_per_class_recall": mean_per_class_recall(predictions, references)}
