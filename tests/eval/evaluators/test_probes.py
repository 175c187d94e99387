"""Probes against scikit-learn's classifiers."""

import numpy as np
import sklearn.datasets
import sklearn.linear_model
import sklearn.neighbors
import torch

from eval.evaluators.probes import knn, linear_probe


def test_probes_match_sklearn():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    x = torch.nn.functional.normalize(torch.tensor(images, dtype=torch.float32), dim=-1)
    y = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    neighbors = sklearn.neighbors.KNeighborsClassifier(
        20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
    ).fit(x[train], y[train])
    agreement = (knn(x[train], y[train], x[test], 100).numpy() == neighbors.predict(x[test])).mean()
    assert agreement > 0.995  # equal but for ties
    accuracy = (linear_probe(x[train], y[train], x[test]) == y[test]).double().mean().item()
    expected = [
        sklearn.linear_model.LogisticRegression(C=c, max_iter=2000).fit(x[train], y[train]).score(x[test], y[test])
        for c in (0.01, 1, 100)
    ]
    assert accuracy >= max(expected) - 0.01 > 0.85
