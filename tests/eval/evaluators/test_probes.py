"""Probes against scikit-learn's classifiers."""

import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model
import sklearn.neighbors
import torch

from eval.evaluators.probes import L2_STRENGTHS, knn, linear_probe
from eval.models import load_model
from eval.runner import evaluate_task
from eval.tasks import Task
from modeling_amorlip.embedder_amorlip import encode_images


def fit_knn(train, labels):
    def weights(distances):
        return np.exp((1 - distances**2 / 2) / 0.07)

    return sklearn.neighbors.KNeighborsClassifier(20, weights=weights, algorithm="brute").fit(train, labels)


def fit_linear(train, labels, strength):
    """Fit the mean cross-entropy with an l2 penalty: scikit-learn sums instead."""
    penalty = 1 / (strength * len(train))
    return sklearn.linear_model.LogisticRegression(C=penalty, max_iter=2000).fit(train, labels)


def test_probes_match_sklearn():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    x = torch.nn.functional.normalize(torch.tensor(images, dtype=torch.float32), dim=-1)
    y = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    neighbors = fit_knn(x[train], y[train])
    agreement = (knn(x[train], y[train], x[test], 100).numpy() == neighbors.predict(x[test])).mean()
    assert agreement > 0.995  # equal but for ties
    accuracy = (linear_probe(x[train], y[train], x[test]) == y[test]).double().mean().item()
    expected = [
        sklearn.linear_model.LogisticRegression(C=c, max_iter=2000).fit(x[train], y[train]).score(x[test], y[test])
        for c in (0.01, 1, 100)
    ]
    assert accuracy >= max(expected) - 0.01 > 0.85


def test_probes_of_a_model_after_a_few_steps_are_confirmed_by_sklearn(tiny_model, demo_rows, tmp_path):
    """Categories of emoji: fitted to the training split, scored on another one, from the files to the accuracies."""
    (tmp_path / "wds_emoji").mkdir()
    splits = {"train": demo_rows.select(range(0, 600, 2)), "test": demo_rows.select(range(1, 400, 2))}
    for name, rows in splits.items():
        columns = rows.select_columns(["image", "category"]).rename_column("category", "label")
        columns.to_parquet(tmp_path / f"wds_emoji/{name}.parquet")
    model, processor = load_model(str(tiny_model))
    task = Task("emoji", repositories=("x/wds_emoji",))
    metrics = evaluate_task(model, processor, task, tmp_path, resamples=0, probes=("knn", "linear")).metrics
    x = {name: encode_images(model, processor, rows["image"]).numpy() for name, rows in splits.items()}
    y = {name: np.array(rows["category"]) for name, rows in splits.items()}
    expected = fit_knn(x["train"], y["train"]).score(x["test"], y["test"])
    assert metrics["knn_acc1"].value == pytest.approx(expected, abs=2 / 200)  # but for ties
    accuracies = [fit_linear(x["train"], y["train"], s).score(x["test"], y["test"]) for s in L2_STRENGTHS]
    assert min(abs(metrics["linear_acc1"].value - accuracy) for accuracy in accuracies) <= 1 / 200
    assert metrics["linear_acc1"].value >= max(accuracies) - 0.08  # the strength is chosen on training images alone
    assert max(metrics["knn_acc1"].value, metrics["linear_acc1"].value) < 0.9  # as no fit to the test images is
