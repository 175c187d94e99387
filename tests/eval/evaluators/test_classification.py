"""Zero-shot classification: metrics against scikit-learn's, prompt ensembles against their definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch

from eval.evaluators.classification import build_classifier, classification_metrics, top_classes


@pytest.mark.parametrize("num_classes", [3, 40])
@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # one is predicted and does not occur
def test_metrics_match_sklearn(num_classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(num_classes - 1, size=500)  # the last class does not occur
    scores = generator.normal(size=(500, num_classes))
    scores[np.arange(500), labels] += 1
    top = np.argsort(-scores, axis=1)[:, :5]
    groups = generator.integers(4, size=500)
    metrics = classification_metrics(top, labels, np.stack([groups, labels], 1), ignored_groups=(2,))
    recall = sklearn.metrics.balanced_accuracy_score(labels, top[:, 0])
    assert metrics["mean_per_class_recall"] == pytest.approx(recall)
    assert metrics["acc1"] == sklearn.metrics.accuracy_score(labels, top[:, 0])
    if num_classes > 5:
        acc5 = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(num_classes))
        assert metrics["acc5"] == acc5
    f1 = sklearn.metrics.f1_score(labels, top[:, 0], average="macro", labels=np.unique(labels))
    assert metrics["F1-macro_all"] == pytest.approx(f1)
    by_group = [(top[groups == g, 0] == labels[groups == g]).mean() for g in (0, 1, 3)]
    assert metrics["acc_worst_region"] == metrics["acc_wg"] == min(by_group)


def test_classifier_is_normalized_mean_of_normalized_embeddings(monkeypatch):
    table = {"a": [3.0, 0.0], "b": [0.0, 1.0], "the a": [0.0, 2.0], "the b": [0.0, 5.0]}

    def stream_texts(model, processor, texts, batch_size):
        for text in texts:  # batches that end within a template
            yield torch.nn.functional.normalize(torch.tensor([table[text]]), dim=-1)

    monkeypatch.setattr("eval.evaluators.classification.stream_texts", stream_texts)
    classifier = build_classifier(None, None, ["a", "b"], ["{}", "the {c}"])
    torch.testing.assert_close(classifier, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_classifier_streams_prompts():
    """A thousand classes by eighty templates: at most three batches of prompts exist at a time."""
    made = encoded = most = 0

    class Template(str):
        def replace(self, old, new):
            nonlocal made, most
            made += old == "{c}"
            most = max(most, made - encoded)
            return str.replace(self, old, new)

    class Model(torch.nn.Module):
        config = SimpleNamespace(model_type="any", text_config=SimpleNamespace(max_position_embeddings=8))
        device = torch.device("cpu")

        def get_text_features(self, input_ids):
            nonlocal encoded
            encoded += len(input_ids)
            return torch.nn.functional.one_hot(input_ids[:, 0] % 16, 16).float()

    processor = SimpleNamespace(
        tokenizer=lambda batch, **_: {"input_ids": torch.tensor([[int(p.split()[0])] for p in batch])}
    )
    classes = [str(i) for i in range(1000)]
    classifier = build_classifier(Model(), processor, classes, [Template(f"{{c}} in {t}") for t in range(80)], 256)
    assert encoded == made == 80_000 and most <= 3 * 256
    assert torch.equal(classifier, torch.nn.functional.one_hot(torch.arange(1000) % 16, 16).float())


def test_top_classes_subtracts_correction():
    images, classifier = torch.eye(3), torch.eye(3)
    assert top_classes(images, classifier, 1)[:, 0].tolist() == [0, 1, 2]
    assert top_classes(images, classifier, 2, torch.tensor([2.0, 0.0, 0.5]), tile_size=2).tolist() == [
        [1, 2],
        [1, 2],
        [2, 1],
    ]
