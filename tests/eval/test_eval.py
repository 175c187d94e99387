"""Metrics against independent computations, and eval/run.py as a user starts it."""

import json
import warnings
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from eval.evaluators.classification import build_classifier, classification_metrics
from eval.evaluators.pixel_baseline import pixel_baseline_accuracy
from eval.evaluators.probes import knn, linear_probe
from eval.evaluators.retrieval import recall_hits, retrieval_metrics
from modeling_amorlip.images_amorlip import preprocess_images
from tests.helpers.checkout import DEMO, ROOT, pretrain, run


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.parametrize("classes", [3, 40])
def test_metrics_equal_scikit_learns(classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(classes - 1, size=500)  # the last class does not occur
    scores = generator.normal(size=(500, classes))
    scores[np.arange(500), labels] += 1
    top = np.argsort(-scores, axis=1)[:, :5]
    groups = generator.integers(4, size=500)
    found = classification_metrics(top, labels, np.stack([groups, labels], 1), ignored_groups=(2,))
    with warnings.catch_warnings(action="ignore"):  # a class that is predicted and does not occur
        assert found["mean_per_class_recall"] == pytest.approx(
            sklearn.metrics.balanced_accuracy_score(labels, top[:, 0])
        )
    assert found["acc1"] == sklearn.metrics.accuracy_score(labels, top[:, 0])
    assert (
        found["acc5"] == sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes)) or classes < 5
    )
    f1 = sklearn.metrics.f1_score(labels, top[:, 0], average="macro", labels=np.unique(labels))
    assert found["F1-macro_all"] == pytest.approx(f1)
    by_group = [(top[groups == g, 0] == labels[groups == g]).mean() for g in (0, 1, 3)]
    assert found["acc_worst_region"] == found["acc_wg"] == min(by_group)


@pytest.mark.parametrize(
    "name", ["top_k_accuracy", "mean_per_class_recall", "macro_f1", "worst_group_accuracy", "jaccard"]
)
def test_metrics_load_as_modules(name):
    module = evaluate.load(str(ROOT / f"eval/metrics/{name}.py"))
    several = name in ("top_k_accuracy", "worst_group_accuracy", "jaccard")
    predictions = [[0, 1], [1, 0], [1, 2]] if several else [0, 1, 1]
    references = [[0, 1], [1], [3]] if name == "jaccard" else [0, 1, 2]
    options = {"groups": [0, 0, 1]} if name == "worst_group_accuracy" else {}
    expected = {
        "top_k_accuracy": 2 / 3,
        "mean_per_class_recall": 2 / 3,
        "macro_f1": (1 + 2 / 3 + 0) / 3,
        "worst_group_accuracy": 0,
        "jaccard": (1 + 1 / 2 + 0) / 3,
    }
    assert module.compute(predictions=predictions, references=references, **options) == {
        name: pytest.approx(expected[name])
    }


@pytest.mark.parametrize("tile_size", [1, 7, 1024])
def test_recall_with_several_captions_an_image(tile_size):
    images, texts = unit(60, 8), unit(300, 8, seed=1)
    image_groups, text_groups = torch.arange(60), torch.arange(300) % 60
    scores = (images.double() @ texts.double().T).numpy()
    hits = []
    for queries, gallery, q, g, matrix in (
        (images, texts, image_groups, text_groups, scores),
        (texts, images, text_groups, image_groups, scores.T),
    ):
        hits.append(recall_hits(queries, gallery, q, g, tile_size=tile_size))
        for i, k in enumerate((1, 5, 10)):
            best = np.argsort(-matrix, axis=1)[:, :k]
            expected = [(g.numpy()[row] == q[n].item()).any() for n, row in enumerate(best)]
            assert hits[-1][:, i].tolist() == expected
    metrics = retrieval_metrics(*hits)
    assert metrics["image_retrieval_recall@10"] == hits[1][:, 2].double().mean().item()
    assert metrics["mean_recall@1"] == np.mean([metrics[f"{n}_retrieval_recall@1"] for n in ("text", "image")])


def test_prompt_ensemble_is_the_normalised_mean_of_normalised_embeddings(monkeypatch):
    table = {"a": [3.0, 0.0], "b": [0.0, 1.0], "the a": [0.0, 2.0], "the b": [0.0, 5.0]}

    def stream_texts(model, processor, texts, batch_size):
        for text in texts:  # batches that end within a template
            yield torch.nn.functional.normalize(torch.tensor([table[text]]), dim=-1)

    monkeypatch.setattr("eval.zero_shot.stream_texts", stream_texts)
    classifier = build_classifier(None, None, ["a", "b"], ["{}", "the {c}"])
    torch.testing.assert_close(classifier, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_a_thousand_classes_by_eighty_templates_stream():
    """Prompts are made when they are encoded, so that at most two batches of 80,000 are there at a time."""
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


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA"])
@pytest.mark.parametrize("size", [(32, 32), (40, 33)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_are_the_image_processors(demo_rows, mode, size, kind):
    shape = {"height": 32, "width": 32}
    options = {"size": {"shortest_edge": 32}, "crop_size": shape} if kind == "clip" else {"size": shape}
    processor = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}[kind](**options)
    images = [demo_rows[i]["image"].convert("RGBA").resize(size) for i in range(5)]
    images = [image if mode == "RGBA" else image.convert("RGB").convert(mode) for image in images]
    white = [Image.new("RGBA", size, "white") for _ in images]
    plain = [
        Image.alpha_composite(w, i).convert("RGB") if mode == "RGBA" else i.convert("RGB")
        for w, i in zip(white, images, strict=True)
    ]
    expected = processor(plain, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess_images(processor, images), expected, rtol=1e-5, atol=1e-6)


def test_probes_equal_scikit_learns():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    x = torch.nn.functional.normalize(torch.tensor(images, dtype=torch.float32), dim=-1)
    y = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    neighbours = sklearn.neighbors.KNeighborsClassifier(
        20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
    ).fit(x[train], y[train])
    agreement = (knn(x[train], y[train], x[test], 100).numpy() == neighbours.predict(x[test])).mean()
    assert agreement > 0.995  # equal but for ties
    ours = (linear_probe(x[train], y[train], x[test]) == y[test]).double().mean().item()
    accuracies = [
        sklearn.linear_model.LogisticRegression(C=c, max_iter=2000).fit(x[train], y[train]).score(x[test], y[test])
        for c in (0.01, 1, 100)
    ]
    assert ours >= max(accuracies) - 0.01 > 0.85


def test_pixel_baseline_counts_right_neighbours():
    red, green, pink = (Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "pink"))
    accuracy = pixel_baseline_accuracy([red, pink, green], ["red", "red", "blue"], [red, green], ["red", "green"])
    assert accuracy == pytest.approx(1 / 3) or accuracy == pytest.approx(2 / 3)
    assert pixel_baseline_accuracy([red, green], ["red", "green"], [red, green], ["red", "green"]) == 1


@pytest.fixture(scope="module")
def trained(recipe_factory, tmp_path_factory):
    """A model trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    result = pretrain(recipe_factory(folder, max_steps=2, warmup_steps=1))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_task_of_ones_own(trained, tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text(f"mine:\n  data: {DEMO}/openmoji.parquet\n  texts: {DEMO}/openmoji.json\n")
    result = run("eval/run.py", "--model", trained, "--tasks", task)
    assert result.returncode == 0 and "mine" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "emoji_openmojo"], "did you mean emoji_openmoji?"),
        (["--tasks", "nothing.yaml"], "does not exist"),
        (["--tasks", "training/study/study_tasks.yaml:emoji-v1"], "no task emoji-v1; there are emoji_style_openmoji"),
        (["--tasks", "emoji_openmoji", "--model", "/nowhere/model"], "there is no such folder"),
    ],
)
def test_mistakes_end_in_one_clear_message(trained, arguments, message):
    result = run("eval/run.py", "--model", trained, *arguments)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_compare_tabulates_runs_over_seeds(tmp_path):
    for objective, seed, value in (("amorlip", 0, 0.5), ("amorlip", 1, 0.7), ("clip", 0, 0.25)):
        folder = tmp_path / f"{objective}_{seed}"
        folder.mkdir()
        (folder / "run_config.yaml").write_text(f"arguments: {{objective: {objective}, seed: {seed}}}")
        results = [{"task": "t", "metric": "acc1", "value": value, "num_samples": 4}]
        (folder / "eval.jsonl").write_text(json.dumps({"step": 1, "results": results}) + "\n")
    folders = sorted(tmp_path.iterdir())
    result = run("eval/compare.py", *folders, "--metrics", "acc1")
    assert result.returncode == 0, result.stderr
    assert "| amorlip | 2 | 60.00 ± 14.14 |" in result.stdout and "| clip | 1 | 25.00 |" in result.stdout
    for arguments, message in (
        ([*folders, "--metrics", "acc7"], "has no acc7; its metrics are acc1"),
        ([folders[0], folders[0]], "second run of amorlip with seed 0"),
        ([tmp_path], "run_config.yaml is missing"),
    ):
        result = run("eval/compare.py", *arguments, *([] if "--metrics" in arguments else ["--metrics", "acc1"]))
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_compare_draws_two_real_runs(recipe_factory, trained, tmp_path):
    other = pretrain(recipe_factory(tmp_path, max_steps=2, warmup_steps=1, objective="clip", objective_args={}))
    assert other.returncode == 0, other.stderr
    results = []
    for name, folder in (("clip", tmp_path / "run"), ("amorlip", trained)):
        results.append(tmp_path / f"{name}.json")
        command = ["--tasks", "emoji_openmoji", "--output", results[-1], "--bootstrap", "0"]
        assert run("eval/run.py", "--model", folder, *command).returncode == 0
        entry = json.loads(results[-1].read_text())["tasks"]["emoji_openmoji"]
        metrics = [{"metric": k, "value": v["value"]} for k, v in entry["metrics"].items()]
        (folder / "eval.jsonl").write_text(json.dumps({"step": 2, "results": metrics}) + "\n")
    for paths, drawn in (
        ([tmp_path / "run", trained], {"differences.png", "radar.png", "curves.png"}),
        (results, {"differences.png"}),
    ):
        folder = tmp_path / f"plots{len(drawn)}"
        if paths is not results:
            (tmp_path / "run").rename(tmp_path / "clip_run")
            paths = [tmp_path / "clip_run", trained]
        result = run("eval/compare.py", *paths, "--plots", folder)
        assert result.returncode == 0, result.stderr
        assert {path.name for path in folder.iterdir()} == drawn
    result = run("eval/compare.py", results[0], "--plots", tmp_path)
    assert result.returncode == 1 and "two runs or more" in result.stderr
