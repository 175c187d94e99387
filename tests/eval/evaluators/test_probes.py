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
from tests.helpers.runs import train


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


MARGIN = 0.01
"""How far accuracies of equal fits may be apart: 4 of 400 images, since two optimizers stop at different points."""


@pytest.mark.e2e
def test_probes_of_a_model_after_12_steps_are_confirmed_by_sklearn(recipe, demo_rows, tmp_path):
    """Categories of emoji, from the files of two splits to the accuracies; scikit-learn fits to the training split."""
    train(recipe(max_steps=12))
    model, processor = load_model(str(tmp_path / "run"))
    (tmp_path / "wds_emoji").mkdir()
    splits = {"train": demo_rows.select(range(0, 800, 2)), "test": demo_rows.select(range(1, 800, 2))}
    for name, rows in splits.items():
        columns = rows.select_columns(["image", "category"]).rename_column("category", "label")
        columns.to_parquet(tmp_path / f"wds_emoji/{name}.parquet")
    task = Task("emoji", repositories=("x/wds_emoji",))
    metrics = evaluate_task(model, processor, task, tmp_path, resamples=0, probes=("knn", "linear")).metrics
    x = {name: encode_images(model, processor, rows["image"]).numpy() for name, rows in splits.items()}
    y = {name: np.array(rows["category"]) for name, rows in splits.items()}
    expected = fit_knn(x["train"], y["train"]).score(x["test"], y["test"])
    assert metrics["knn_acc1"].value == pytest.approx(expected, abs=MARGIN)
    order = torch.randperm(len(x["train"]), generator=torch.Generator().manual_seed(0)).numpy()
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    validated, accuracies = [], []
    for strength in L2_STRENGTHS:
        fit = fit_linear(x["train"][rest], y["train"][rest], strength)
        validated.append(fit.score(x["train"][held_out], y["train"][held_out]))
        accuracies.append(fit_linear(x["train"], y["train"], strength).score(x["test"], y["test"]))
    # One held-out image may decide otherwise between two strengths.
    near_best = max(validated) - 1.5 / len(held_out)
    chosen = [accuracy for value, accuracy in zip(validated, accuracies, strict=True) if value > near_best]
    assert min(abs(metrics["linear_acc1"].value - accuracy) for accuracy in chosen) <= MARGIN
    assert len(chosen) < 4 and min(chosen) > min(accuracies) + 10 * MARGIN  # most strengths would not pass
