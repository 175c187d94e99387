"""Tasks on miniatures of their layouts, made of real pictures, against independent computations."""

import shutil

import datasets
import numpy as np
import pytest
import sklearn.datasets
import sklearn.metrics
import torch
from PIL import Image

import eval.run
from eval.evaluators.probes import knn
from eval.models import load_model
from eval.report import read_report
from eval.runner import EvaluationOptions, evaluate_task
from eval.tasks import METRICS, known_tasks, select_tasks
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from tests.helpers.checkout import run
from tests.helpers.models import save_model
from tests.helpers.tasks import encoded, read_json, run_main, write_classification, write_task_shards


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


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
        labels = [i % task.num_classes for i in range(n)]
        grouped = task.name.startswith(("wilds/", "fairness/"))
        metadata = [np.array([i % 3, 7, label]) for i, label in enumerate(labels)] if grouped else None
        names = [f"thing {c}" for c in range(task.num_classes)]
        write_classification(folder, pictures[:n], labels, names, metadata=metadata, form="WEBP")


@pytest.mark.e2e
def test_every_datacomp_task_runs_on_its_layout(model_folder, pictures, tmp_path, monkeypatch, capsys):
    tasks = select_tasks(["datacomp"])
    assert len(tasks) == 38
    for i, task in enumerate(tasks):
        folder = task.repositories[i % len(task.repositories)].split("/")[-1]
        write_miniature(task, tmp_path / "data" / folder, pictures)
    output = tmp_path / "results.json"
    options = ["--data_dir", tmp_path / "data", "--output", output, "--bootstrap", "20", "--scoring", *EXTRA]
    options += ["--num_workers", "0"]
    assert run_main(monkeypatch, eval.run, "--model", model_folder, "--tasks", "datacomp", *options) == 0
    report = read_report(output)
    assert len(report.tasks) == 38
    names = {kind: set() for kind in METRICS}
    for i, task in enumerate(tasks):
        result = report.tasks[task.name]
        names[task.kind] |= set(result.metrics)
        assert result.status == "partial" and f"instead of {task.size}" in result.reason
        assert result.hub_dataset == task.repositories[i % len(task.repositories)]
        low, high = result.metrics[task.main_metric].ci95
        assert 0 <= low <= high <= 1 and 0 <= result.value <= 1
        assert set(result.scores) == ({"cosine"} if task.kind == "winogavil" else {"cosine", *EXTRA})
    assert names == {kind: set(metrics) for kind, metrics in METRICS.items()}
    assert report.aggregates["datacomp_38"].value is None and "incomplete" in capsys.readouterr().out
    assert Image.open(output.with_suffix(".png")).height > 500  # 38 bars


EXTRA = ("exact", "amortized", "sinkhorn")


@pytest.fixture(scope="module")
def digits(tmp_path_factory, pictures):
    """300 handwritten digits and 24 captioned emoji in the public layout, with a task file for both."""
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


def test_classification_matches_sklearn(model_folder, digits):
    folder, images, labels, classes, *_ = digits
    model, processor = load_model(str(model_folder))
    (task,) = select_tasks([f"{folder / 'tasks.yaml'}:digits"])
    result = evaluate_task(model, processor, task, folder, scorings=("cosine", EXTRA[0]), resamples=0)
    x = encode_images(model, processor, images, 64)
    prompts = [[t.format(c=c) for t in ("a {c}.", "number {c}", "{c}")] for c in classes]
    y = torch.stack([encode_texts(model, processor, prompt).mean(0) for prompt in prompts])
    y = torch.nn.functional.normalize(y, dim=-1)
    logits = (model.logit_scale.exp() * x @ y.T).detach()
    for scoring, scores in (("cosine", logits), (EXTRA[0], logits - logits.logsumexp(0))):
        metrics, predicted = result.scores[scoring], scores.argmax(1).numpy()
        assert metrics["acc1"].value == sklearn.metrics.accuracy_score(labels, predicted)
        assert metrics["acc5"].value == sklearn.metrics.top_k_accuracy_score(labels, scores.numpy(), k=5)
        recall = sklearn.metrics.balanced_accuracy_score(labels, predicted)
        assert metrics["mean_per_class_recall"].value == pytest.approx(recall, rel=1e-15)


def test_retrieval_matches_brute_force(model_folder, digits):
    folder, *_, pictures, captions = digits
    model, processor = load_model(str(model_folder))
    (task,) = select_tasks([f"{folder / 'tasks.yaml'}:emoji"])
    metrics = evaluate_task(model, processor, task, folder, resamples=0).metrics
    x = encode_images(model, processor, pictures)
    y = encode_texts(model, processor, sum(captions, []))
    owner = np.repeat(np.arange(24), [len(lines) for lines in captions])
    scores = (x @ y.T).numpy()
    for k in (1, 5, 10):
        best = np.argsort(-scores, axis=1)[:, :k]
        expected = np.mean([(owner[row] == i).any() for i, row in enumerate(best)])
        assert metrics[f"text_retrieval_recall@{k}"].value == expected
        best = np.argsort(-scores.T, axis=1)[:, :k]
        expected = np.mean([(row == owner[j]).any() for j, row in enumerate(best)])
        assert metrics[f"image_retrieval_recall@{k}"].value == expected


@pytest.mark.e2e
def test_results_do_not_depend_on_the_number_of_processes(model_folder, digits, pictures, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(digits[0], folder)
    (folder / "tasks.yaml").write_text(
        (folder / "tasks.yaml").read_text()
        + "cues: {repositories: [nlphuji/winogavil], kind: winogavil, main_metric: jaccard_score}\n"
    )
    write_miniature(known_tasks()["misc/winogavil"], folder / "winogavil", pictures)
    results = []
    for launch in (None, 2, 4):
        output = tmp_path / f"{launch}.json"
        options = ["--tasks", folder / "tasks.yaml", "--data_dir", folder, "--output", output, "--bootstrap", "10"]
        options += ["--batch_size", "48", "--num_workers", "0" if launch else "2", "--scoring", "sinkhorn"]
        result = run("eval/run.py", "--model", model_folder, *options, launch=launch)
        assert result.returncode == 0, result.stderr
        results.append(read_json(output)["tasks"])
    assert len(results[0]) == 3 and results[0] == results[1] == results[2]


def test_run_continues_and_bad_task_costs_no_other(model_folder, digits, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(digits[0], folder)
    shard = folder / "wds_digits/test/1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    output = tmp_path / "results.json"
    command = ["--model", model_folder, "--tasks", folder / "tasks.yaml", "imagenet1k", "--data_dir", folder]
    command += ["--output", output, "--bootstrap", "0", "--num_workers", "0"]
    assert run_main(monkeypatch, eval.run, *command) == 1
    tasks = read_report(output).tasks
    statuses = {name: result.status for name, result in tasks.items()}
    assert statuses == {"digits": "missing", "emoji": "complete", "imagenet1k": "missing"}
    assert "is cut off" in tasks["digits"].reason and "--download imagenet1k" in tasks["imagenet1k"].reason
    shard.write_bytes(content)
    run_main(monkeypatch, eval.run, *command)
    assert "emoji: done before" in capsys.readouterr().out
    digits_result = read_report(output).tasks["digits"]
    assert digits_result.status == "complete" and digits_result.num_samples == 300


@pytest.mark.e2e
def test_result_of_something_else_is_not_taken_over(model_folder, digits, tmp_path, monkeypatch, capsys):
    """New weights, processor, tokenizer, task, template, data or settings each mean a new evaluation."""
    folder, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(digits[0], folder)
    shutil.copytree(model_folder, model)
    command = ["--model", model, "--tasks", f"{folder / 'tasks.yaml'}:digits", "--data_dir", folder]
    command += ["--output", tmp_path / "results.json", "--bootstrap", "0", "--num_workers", "0"]

    def is_taken_over(*options):
        assert run_main(monkeypatch, eval.run, *command, *options) == 0
        return "digits: done before" in capsys.readouterr().out

    def replace(path, old, new):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    assert not is_taken_over() and is_taken_over()
    changes = [
        lambda: save_model(model, seed=1),
        lambda: replace(model / "processor_config.json", '"image_mean": [', '"image_mean": [ 0.1, 0.1, 0.1], "x": ['),
        lambda: replace(folder / "tasks.yaml", "size: 300", "size: 299"),
        lambda: replace(folder / "wds_digits/zeroshot_classification_templates.txt", "number {c}", "digit {c}"),
        lambda: shutil.copy(folder / "wds_digits/test/0.tar", folder / "wds_digits/test/1.tar"),
    ]
    for change in changes:
        change()
        assert not is_taken_over() and is_taken_over()
    assert not is_taken_over("--scoring", "exact") and is_taken_over("--scoring", "gallery")
    assert not is_taken_over("--dtype", "bfloat16")
    shutil.copytree(model, tmp_path / "other")
    assert run_main(monkeypatch, eval.run, *command, "--model", tmp_path / "other") == 1
    assert "holds results of" in capsys.readouterr().err


def test_outputs_are_checked_before_the_work(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(eval.run, "load_model", lambda *_, **__: pytest.fail("the work began"))
    for option in ("--output", "--contact_sheet"):
        command = ["--model", model_folder, "--tasks", "emoji_openmoji", option, tmp_path / "file/r.json"]
        assert run_main(monkeypatch, eval.run, *command) == 1
        assert f"{option} {tmp_path / 'file'}" in capsys.readouterr().err


def test_worker_processes_and_autocast(model_folder, digits):
    folder = digits[0]
    model, processor = load_model(str(model_folder))
    (task,) = select_tasks([f"{folder / 'tasks.yaml'}:digits"])
    results = [
        evaluate_task(model, processor, task, folder, 64, resamples=0, options=options)
        for options in (EvaluationOptions(), EvaluationOptions(num_workers=2))
    ]
    assert results[0] == results[1]
    half = evaluate_task(model, processor, task, folder, 64, options=EvaluationOptions(dtype=torch.bfloat16))
    assert half.num_samples == 300 and model.dtype == torch.float32


def test_probe_of_the_split_that_is_evaluated_is_refused(model_folder, demo_rows, tmp_path):
    demo_rows.select(range(4)).select_columns(["image"]).add_column("label", list("abab")).to_parquet(
        tmp_path / "train.parquet"
    )
    for split, message in (("train", "needs a training split other than"), ("test", "there is no train split")):
        (tmp_path / "t.yaml").write_text(f"mine: {{data: train.parquet, split: {split}}}")
        (task,) = select_tasks([str(tmp_path / "t.yaml")])
        with pytest.raises(UserError, match=message):
            evaluate_task(*load_model(str(model_folder)), task, tmp_path, probes=("knn",), resamples=0)


def test_missing_shards_are_counted(model_folder, digits, tmp_path):
    shutil.copytree(digits[0], tmp_path / "data")
    (tmp_path / "data/wds_digits/test/1.tar").unlink()
    (task,) = select_tasks([f"{tmp_path / 'data/tasks.yaml'}:digits"])
    result = evaluate_task(*load_model(str(model_folder)), task, tmp_path / "data", resamples=0)
    assert result.status == "partial" and "1 shards are missing" in result.reason and result.num_samples == 150


def test_probes_are_fitted_to_the_training_split(model_folder, digits, tmp_path):
    folder, images, labels, *_ = digits
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (task,) = select_tasks([f"{data / 'tasks.yaml'}:digits"])
    model, processor = load_model(str(model_folder))
    with pytest.raises(UserError, match="holds neither train/"):
        evaluate_task(model, processor, task, data, resamples=0, probes=("knn",))
    shutil.copytree(data / "wds_digits/test", data / "wds_digits/train")
    (data / "wds_digits/train/1.tar").unlink()
    metrics = evaluate_task(model, processor, task, data, resamples=0, probes=("knn",)).metrics
    x, y = encode_images(model, processor, images), torch.from_numpy(labels)
    assert metrics["knn_acc1"].value == (knn(x[:150], y[:150], x) == y).double().mean().item()


def test_broken_image_is_named_and_counted(model_folder, pictures, tmp_path):
    samples = [[("png", encoded(p)), ("cls", str(i % 2).encode())] for i, p in enumerate(pictures[:8])]
    samples[5][0] = ("png", encoded(pictures[5])[:200])
    write_task_shards(tmp_path / "wds_mine", samples, shards=1)
    (tmp_path / "wds_mine/classnames.txt").write_text("a\nb")
    (tmp_path / "wds_mine/zeroshot_classification_templates.txt").write_text("a {c}.")
    (tmp_path / "t.yaml").write_text("mine: {repositories: [x/wds_mine], size: 8}")
    (task,) = select_tasks([str(tmp_path / "t.yaml")])
    result = evaluate_task(*load_model(str(model_folder)), task, tmp_path, resamples=0)
    assert result.status == "partial" and result.num_samples == 7
    assert result.unreadable[0].startswith("0.tar: s0_00005 (") and "0.tar: s0_00005" in result.reason


def test_retrieval_task_of_ones_own(model_folder, demo_rows, tmp_path):
    demo_rows.select(range(20)).select_columns(["image", "caption"]).to_parquet(tmp_path / "mine.parquet")
    task = "mine: {data: mine.parquet, kind: retrieval, main_metric: mean_recall@1, size: 20}"
    (tmp_path / "task.yaml").write_text(task)
    (task,) = select_tasks([str(tmp_path / "task.yaml")])
    result = evaluate_task(*load_model(str(model_folder)), task, tmp_path, resamples=0)
    assert result.status == "complete" and result.hub_dataset is None


def test_image_folder_and_any_dual_encoder(model_folder, pictures, tmp_path):
    from transformers import AutoProcessor, CLIPConfig, CLIPModel

    for i, picture in enumerate(pictures[:6]):
        (tmp_path / f"images/test/kind_{i % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"images/test/kind_{i % 2}/{i}.png")
    (tmp_path / "task.yaml").write_text("mine: {data: images}\n")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    text = {**small, "vocab_size": 1000, "max_position_embeddings": 32, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    AutoProcessor.from_pretrained(model_folder).save_pretrained(tmp_path / "clip")
    (task,) = select_tasks([str(tmp_path / "task.yaml")])
    model, processor = load_model(str(tmp_path / "clip"))
    assert evaluate_task(model, processor, task, tmp_path, resamples=0).num_samples == 6
    with pytest.raises(UserError, match="this one has none"):
        evaluate_task(model, processor, task, tmp_path, scorings=("amortized",))


def test_list_names_every_task(monkeypatch, capsys):
    assert run_main(monkeypatch, eval.run, "--list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(known_tasks())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "emoji_openmojo"], "did you mean emoji_openmoji?"),
        (["--tasks", "training/study/study_tasks.yaml:emoji-v1"], "no task emoji-v1; there are emoji_style_openmoji"),
        (["--tasks", "emoji_openmoji", "--model", "/nowhere/model"], "there is no such folder"),
        (["--tasks", "emoji_openmoji", "--push_to_hub", "u/x"], "--push_to_hub needs --output"),
    ],
)
def test_mistake_ends_in_one_message(model_folder, arguments, message, monkeypatch, capsys):
    assert run_main(monkeypatch, eval.run, "--model", model_folder, *arguments) == 1
    assert message in capsys.readouterr().err
