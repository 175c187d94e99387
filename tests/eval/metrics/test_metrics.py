"""Metrics as modules for `evaluate.load`."""

import evaluate
import pytest

from tests.helpers.checkout import ROOT


@pytest.mark.parametrize(
    "name, predictions, references, options, expected",
    [
        ("top_k_accuracy", [[0, 1], [1, 0], [1, 2]], [0, 1, 2], {}, 2 / 3),
        ("top_k_accuracy", [[0, 1], [1, 0], [1, 2]], [0, 1, 2], {"k": 2}, 1),
        ("mean_per_class_recall", [0, 1, 1], [0, 1, 2], {}, 2 / 3),
        ("macro_f1", [0, 1, 1], [0, 1, 2], {}, (1 + 2 / 3 + 0) / 3),
        ("worst_group_accuracy", [[0, 1], [1, 0], [1, 2]], [0, 1, 2], {"groups": [0, 0, 1]}, 0),
        ("jaccard", [[0, 1], [1, 0], [1, 2]], [[0, 1], [1], [3]], {}, (1 + 1 / 2 + 0) / 3),
    ],
)
def test_metric_loads_as_module(name, predictions, references, options, expected):
    module = evaluate.load(str(ROOT / f"eval/metrics/{name}.py"))
    assert module.compute(predictions=predictions, references=references, **options) == {name: pytest.approx(expected)}
