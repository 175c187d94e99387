"""All tasks of tasks.yaml on miniatures of their layouts, made of real pictures; aggregates; runs that go on."""

import json
import shutil

import datasets
import numpy as np
import pytest
import sklearn.datasets
import sklearn.metrics
import torch
from PIL import Image

from eval.evaluators.probes import knn
from eval.models import load_model
from eval.tasks import aggregate, known_tasks, select_tasks
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from tests.helpers.checkout import pretrain, run
from tests.helpers.tasks import encoded, write_classification, write_task_shards


@pytest.fixture(scope="module")
def trained(recipe_factory, tmp_path_factory):
    """A model trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    result = pretrain(recipe_factory(folder, max_steps=4, warmup_steps=1))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(demo_rows):
    return [demo_rows[i]["image"].convert("RGB") for i in range(24)]


def write_miniature(task, folder, pictures):
    n = 12
    if task.kind == "winogavil":
        rows = [
            {
                "cue": cue,
                "candidates": [str(i) for i in range(k)],
                "associations": ["1", "3"],
                "candidates_images": [{"bytes": encoded(p)} for p in pictures[:k]],
            }
            for cue, k in (("Orange", 5), ("cat", 10), ("heart", 12), ("sun", 12))
        ]
        folder.mkdir(parents=True)
        rows = datasets.Dataset.from_list(rows)
        rows.cast_column("candidates_images", [datasets.Image()]).to_parquet(folder / "test.parquet")
    elif task.kind == "retrieval" and "flickr" in task.name:
        write_task_shards(
            folder,
            [[("jpg", encoded(p, "JPEG")), ("txt", f"a {i}\nthe {i}".encode())] for i, p in enumerate(pictures[:n])],
        )
    elif task.kind == "retrieval":
        rows = [{"image": {"bytes": encoded(p)}, "caption": [f"a {i}", f"one {i}"]} for i, p in enumerate(pictures[:n])]
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "0.parquet")
    else:
        classes = task.num_classes
        labels = [i % classes for i in range(n)]
        grouped = task.name.startswith(("wilds/", "fairness/"))
        metadata = [np.array([i % 3, 7, label]) for i, label in enumerate(labels)] if grouped else None
        names = [f"thing {c}" for c in range(classes)]
        write_classification(folder, pictures[:n], labels, names, metadata=metadata, form="WEBP")


def test_every_task_of_datacomp_runs_on_its_layout(trained, pictures, tmp_path):
    tasks = select_tasks(["datacomp"])
    assert len(tasks) == 38
    for i, task in enumerate(tasks):
        write_miniature(
            task, tmp_path / "data" / task.repositories[i % len(task.repositories)].split("/")[-1], pictures
        )
    output = tmp_path / "results.json"
    options = ["--data_dir", tmp_path / "data", "--output", output, "--bootstrap", "20"]
    result = run(
        "eval/run.py", "--model", trained, "--tasks", "datacomp", *options, "--scoring", "gallery", "amortized"
    )
    assert result.returncode == 0, result.stderr + result.stdout
    report = json.loads(output.read_text())
    assert report["schema_version"] == 3 and len(report["tasks"]) == 38
    for task in tasks:
        entry = report["tasks"][task.name]
        assert entry["status"] == "partial" and f"instead of {task.size}" in entry["reason"]
        main = entry["metrics"][task.main_metric]
        assert 0 <= main["ci95"][0] <= main["value"] <= main["ci95"][1] <= 1 or task.num_classes == 2
        if task.kind != "winogavil":
            assert set(entry["scoring"]) == {"gallery", "amortized"}
    assert not report["aggregates"]["datacomp_38"]["complete"]
    assert report["aggregates"]["datacomp_38"]["value"] is None and "incomplete" in result.stdout
    assert output.with_suffix(".csv").read_text().startswith("task,status,scoring,metric,value")
    assert Image.open(output.with_suffix(".png")).height > 500  # 38 bars


def test_aggregates_are_means_and_say_what_is_missing():
    names = [name for name, task in known_tasks().items() if "datacomp" in task.groups]
    values = {name: i / 100 for i, name in enumerate(names)}
    whole = aggregate(values)
    assert whole["datacomp_38"] == {"value": pytest.approx(sum(range(38)) / 3800), "complete": True, "missing": []}
    shifts = ["imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet"]
    assert whole["imagenet_shifts"]["value"] == pytest.approx(np.mean([values[n] for n in shifts]))
    seven = np.mean([values[n] for n in ["imagenet1k", *shifts]])
    assert whole["imagenet_and_shifts"]["value"] == pytest.approx(seven)
    pair = [n for n in names if n.startswith("retrieval/")]
    assert whole["flickr_coco"]["value"] == pytest.approx(np.mean([values[n] for n in pair])) and len(pair) == 2
    assert whole["retrieval_3"]["value"] == pytest.approx(np.mean([values[n] for n in [*pair, "misc/winogavil"]]))
    assert len([n for n, t in known_tasks().items() if "vtab" in t.groups]) == 13
    partial = aggregate({**values, "cars": None})
    assert partial["datacomp_38"] == {"value": None, "complete": False, "missing": ["cars"]}
    assert partial["imagenet"]["complete"]
    assert aggregate({"emoji_openmoji": 0.5}) == {}


@pytest.fixture(scope="module")
def digits(tmp_path_factory, pictures):
    """300 handwritten digits and 24 captioned emoji in the public layout, with a task file for each."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = [Image.fromarray((16 * x.reshape(8, 8)).clip(0, 255).astype(np.uint8)) for x in images[:300]]
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    write_classification(folder / "wds_digits", images, labels[:300], classes, ("a {c}.", "number {c}", "{c}"))
    captions = [[f"picture {i}", f"a {i} thing", *([f"{i} more"] if i % 3 == 0 else [])] for i in range(24)]
    write_task_shards(
        folder / "wds_emoji",
        [
            [("png", encoded(p)), ("txt", "\n".join(lines).encode())]
            for p, lines in zip(pictures, captions, strict=True)
        ],
        shards=1,
    )
    (folder / "tasks.yaml").write_text(
        "digits: {repositories: [x/wds_digits], size: 300, main_metric: mean_per_class_recall}\n"
        "emoji: {repositories: [x/wds_emoji], kind: retrieval, size: 24, main_metric: mean_recall@1}\n"
    )
    order = [i for shard in (0, 1) for i in range(shard, 300, 2)]
    return folder, [images[i] for i in order], np.array(labels)[order], classes, pictures, captions


def test_scores_equal_an_independent_computation(trained, digits, tmp_path):
    folder, images, labels, classes, pictures, captions = digits
    output = tmp_path / "results.json"
    options = ["--tasks", folder / "tasks.yaml", "--data_dir", folder, "--output", output, "--scoring", "gallery"]
    result = run("eval/run.py", "--model", trained, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())["tasks"]
    assert {entry["status"] for entry in report.values()} == {"complete"}

    model, processor = load_model(str(trained))
    x = encode_images(model, processor, images, 64)
    prompts = [[t.format(c=c) for t in ("a {c}.", "number {c}", "{c}")] for c in classes]
    y = torch.stack([encode_texts(model, processor, prompt).mean(0) for prompt in prompts])
    y = torch.nn.functional.normalize(y, dim=-1)
    logits = (model.logit_scale.exp() * x @ y.T).detach()
    for scoring, scores in (("cosine", logits), ("gallery", logits - logits.logsumexp(0))):
        metrics = report["digits"]["metrics"] if scoring == "cosine" else report["digits"]["scoring"]["gallery"]
        predicted = scores.argmax(1).numpy()
        assert metrics["acc1"]["value"] == sklearn.metrics.accuracy_score(labels, predicted)
        assert metrics["acc5"]["value"] == sklearn.metrics.top_k_accuracy_score(labels, scores.numpy(), k=5)
        recall = sklearn.metrics.balanced_accuracy_score(labels, predicted)
        assert metrics["mean_per_class_recall"]["value"] == pytest.approx(recall, rel=1e-15)

    x = encode_images(model, processor, pictures)
    y = encode_texts(model, processor, sum(captions, []))
    owner = np.repeat(np.arange(24), [len(lines) for lines in captions])
    scores = (x @ y.T).numpy()
    for k in (1, 5, 10):
        best = np.argsort(-scores, axis=1)[:, :k]
        expected = np.mean([(owner[row] == i).any() for i, row in enumerate(best)])
        assert report["emoji"]["metrics"][f"text_retrieval_recall@{k}"]["value"] == expected
        best = np.argsort(-scores.T, axis=1)[:, :k]
        expected = np.mean([(row == owner[j]).any() for j, row in enumerate(best)])
        assert report["emoji"]["metrics"][f"image_retrieval_recall@{k}"]["value"] == expected


def test_two_processes_count_each_sample_once(trained, digits, tmp_path):
    folder = digits[0]
    reports = []
    for launch in (None, 2):
        output = tmp_path / f"{launch}.json"
        options = ["--tasks", folder / "tasks.yaml", "--data_dir", folder, "--output", output, "--bootstrap", "10"]
        result = run("eval/run.py", "--model", trained, *options, launch=launch)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(output.read_text())["tasks"])
    assert reports[0] == reports[1]


def test_an_evaluation_goes_on_and_a_bad_task_costs_no_other(trained, digits, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(digits[0], folder)
    shard = folder / "wds_digits/test/1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    output = tmp_path / "results.json"
    command = ["eval/run.py", "--model", trained, "--tasks", folder / "tasks.yaml", "imagenet1k", "--data_dir", folder]
    command += ["--output", output, "--bootstrap", "0"]
    result = run(*command)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    tasks = json.loads(output.read_text())["tasks"]
    assert {name: entry["status"] for name, entry in tasks.items()} == {
        "digits": "missing",
        "emoji": "complete",
        "imagenet1k": "missing",
    }
    assert "is cut off" in tasks["digits"]["reason"] and "--download imagenet1k" in tasks["imagenet1k"]["reason"]
    shard.write_bytes(content)
    result = run(*command)
    assert "emoji: done before" in result.stdout
    tasks = json.loads(output.read_text())["tasks"]
    assert tasks["digits"]["status"] == "complete" and tasks["digits"]["num_samples"] == 300
    shard.unlink()
    tasks["digits"]["status"] = "failed"
    report = json.loads(output.read_text()) | {"tasks": tasks}
    output.write_text(json.dumps(report))
    run(*command)
    entry = json.loads(output.read_text())["tasks"]["digits"]
    assert entry["status"] == "partial" and "1 shards are missing" in entry["reason"] and entry["num_samples"] == 150
    other = run(*command[:-1], "0", "--scoring", "gallery")
    assert other.returncode == 1 and "something else than results of this model" in other.stderr


def test_probes_are_fitted_to_the_training_split(trained, digits, tmp_path):
    folder, images, labels, *_ = digits
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    options = ["--tasks", data / "tasks.yaml", "--data_dir", data, "--bootstrap", "0", "--probe", "knn", "linear"]
    result = run("eval/run.py", "--model", trained, *options)
    assert "holds neither train/*.tar" in result.stdout
    shutil.copytree(data / "wds_digits/test", data / "wds_digits/train")
    output = tmp_path / "results.json"
    result = run("eval/run.py", "--model", trained, *options, "--output", output)
    assert result.returncode == 0, result.stderr
    metrics = json.loads(output.read_text())["tasks"]["digits"]["metrics"]
    model, processor = load_model(str(trained))
    x, y = encode_images(model, processor, images), torch.from_numpy(labels)
    assert metrics["knn_acc1"]["value"] == (knn(x, y, x) == y).double().mean().item()
    assert metrics["linear_acc1"]["value"] > 0.5 > metrics["acc1"]["value"]


def test_retrieval_of_ones_own(trained, demo_rows, tmp_path):
    demo_rows.select(range(20)).select_columns(["image", "caption"]).to_parquet(tmp_path / "mine.parquet")
    task = "mine: {data: mine.parquet, kind: retrieval, main_metric: mean_recall@1, size: 20}"
    (tmp_path / "task.yaml").write_text(task)
    options = ["--tasks", tmp_path / "task.yaml", "--data_dir", tmp_path, "--output", tmp_path / "r.json"]
    result = run("eval/run.py", "--model", trained, *options)
    assert result.returncode == 0 and "mean_recall@1" in result.stdout, result.stderr + result.stdout


def test_any_labelled_data_set_and_any_dual_encoder(digits, trained, pictures, tmp_path):
    from transformers import AutoProcessor, CLIPConfig, CLIPModel

    for i, picture in enumerate(pictures[:6]):
        (tmp_path / f"images/test/kind_{i % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"images/test/kind_{i % 2}/{i}.png")
    (tmp_path / "task.yaml").write_text("mine: {data: images}\n")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    text = {**small, "vocab_size": 1000, "max_position_embeddings": 32, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    AutoProcessor.from_pretrained(trained).save_pretrained(tmp_path / "clip")
    options = ["--tasks", tmp_path / "task.yaml", "--data_dir", tmp_path]
    result = run("eval/run.py", "--model", tmp_path / "clip", *options)
    assert result.returncode == 0 and "mine" in result.stdout, result.stderr
    result = run("eval/run.py", "--model", tmp_path / "clip", *options, "--scoring", "amortized")
    assert result.returncode == 1 and "this one has none" in result.stdout


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine: {data: a, kind: guess}", "choose one of classification"),
        ("mine: {dta: a}", "did you mean data?"),
        ("mine: {}", "needs either repositories or data"),
        ("[1, 2", "is not YAML"),
    ],
)
def test_wrong_task_files_are_named(text, message, tmp_path):
    from modeling_amorlip.cli_amorlip import UserError

    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        select_tasks([str(tmp_path / "t.yaml")])
    with pytest.raises(UserError, match="did you mean imagenet1k"):
        select_tasks(["imagenet1"])


def test_list_names_every_task():
    result = run("eval/run.py", "--list")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1 + len(known_tasks())
