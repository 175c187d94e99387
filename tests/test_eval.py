"""Metrics against independent computations, and eval/run.py as a user starts it."""

import json

import numpy as np
import pytest
import torch
from conftest import DEMO, pretrain, run
from PIL import Image

from eval.pixel_baseline import pixel_baseline_accuracy
from eval.retrieval import recalls, retrieval_metrics
from eval.zero_shot import build_classifier, zero_shot_metrics


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.parametrize("classes", [3, 40])
def test_zero_shot_accuracy_equals_counting(classes):
    images, classifier = unit(500, 8), unit(classes, 8, seed=1)
    labels = torch.randint(classes, (500,), generator=torch.Generator().manual_seed(2))
    order = np.argsort(-(images.double() @ classifier.double().T).numpy(), axis=1)
    expected = {f"acc{k}": np.mean([labels[i].item() in order[i, :k] for i in range(500)]) for k in (1, 5)}
    assert zero_shot_metrics(images, classifier, labels) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("tile_size", [1, 7, 1024])
def test_recall_with_several_captions_an_image(tile_size):
    images, texts = unit(60, 8), unit(300, 8, seed=1)
    image_groups, text_groups = torch.arange(60), torch.arange(300) % 60
    scores = (images.double() @ texts.double().T).numpy()
    for queries, gallery, q, g, matrix in (
        (images, texts, image_groups, text_groups, scores),
        (texts, images, text_groups, image_groups, scores.T),
    ):
        found = recalls(queries, gallery, q, g, tile_size=tile_size)
        for k, value in found.items():
            best = np.argsort(-matrix, axis=1)[:, :k]
            assert value == np.mean([(g.numpy()[row] == q[i].item()).any() for i, row in enumerate(best)])
    metrics = retrieval_metrics(images, texts, image_groups, text_groups)
    assert metrics["image_retrieval_recall@10"] == found[10]


def test_prompt_ensemble_is_the_normalised_mean_of_normalised_embeddings(monkeypatch):
    table = {"a": [3.0, 0.0], "b": [0.0, 1.0], "the a": [0.0, 2.0], "the b": [0.0, 5.0]}

    def encode_texts(model, processor, texts, batch_size):
        return torch.nn.functional.normalize(torch.tensor([table[text] for text in texts]), dim=-1)

    monkeypatch.setattr("eval.zero_shot.encode_texts", encode_texts)
    classifier = build_classifier(None, None, ["a", "b"], ["{}", "the {}"])
    torch.testing.assert_close(classifier, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


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
    assert result.returncode == 0 and "mine" in result.stdout and "pixel" not in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "emoji_openmojo"], "did you mean emoji_openmoji?"),
        (["--tasks", "nothing.yaml"], "does not exist"),
        (["--tasks", "emoji_openmoji", "--data_dir", "/nowhere"], "the task's data is missing"),
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
