"""F1 score, its mean over classes (WILDS: those that occur)."""

import datasets
import evaluate
import numpy as np


def macro_f1(predictions, references):
    """Predicted and true classes [n]; the mean is over classes that occur in the references."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    classes = max(predictions.max(), references.max()) + 1
    true = np.bincount(references, minlength=classes)
    predicted = np.bincount(predictions, minlength=classes)
    found = np.bincount(references[predictions == references], minlength=classes)
    return float((2 * found / np.maximum(true + predicted, 1))[true > 0].mean())


class MacroF1(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {"macro_f1": macro_f1(predictions, references)}
