"""The study harness and calibration, as a user starts them, on a few steps."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import DEMO, ROOT, TINY, run, with_threads
from training.study.study import Harness, Run, Study, read_study
from training.study.study_results import gains_table, results_table


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder with a task of 40 images, in the form of a YAML file, and 100 pairs to train on."""
    import datasets

    folder = tmp_path_factory.mktemp("study_data")
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train")
    rows.select(range(40)).to_parquet(folder / "held_out.parquet")
    pairs = datasets.load_dataset("parquet", data_files=str(DEMO / "train.parquet"), split="train")
    pairs.select(range(100)).to_parquet(folder / "pairs.parquet")
    task = {"data": "held_out.parquet", "texts": str(DEMO / "openmoji.json")}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tiny": task}))
    return folder


@pytest.fixture(scope="module")
def study_file(held_out):
    """A study of two methods with two settings each, and of two seeds; one setting is bound to lose."""
    base = {**TINY, "train_data": "pairs.parquet", "num_train_epochs": 2, "checkpoint_every": 2, "objective_args": {}}
    (held_out / "recipe.yaml").write_text(yaml.safe_dump(base))
    study = {
        "recipe": str(held_out / "recipe.yaml"),
        "tasks": str(held_out / "tasks.yaml"),
        "samples_per_epoch": 96,
        "development": ["tiny"],
        "report": ["tiny"],
        "seeds": [0, 1],
        "tuning_batch_size": 16,
        "batch_sizes": [16],
        "warmup_samples": 32,
        "evaluations": 1,
        "grid": {"learning_rate": [1e-3, 1e-2]},
        "methods": {
            "clip": {"objective": "clip"},
            "ours_0.5": {
                "objective": "amorlip",
                "amortizer_config": {"head_type": "queue", "size": 32},
                "grid": {"objective_args.beta": [0.5], "learning_rate": [1e-2, 1e-3]},
            },
        },
    }
    path = held_out / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def harness(study_file, folder, **changes) -> Harness:
    return Harness(Study(**{**yaml.safe_load(study_file.read_text()), **changes}), folder, study_file.parent)


def test_whole_study(study_file, held_out, tmp_path):
    command = ["training/study/study.py", "--config", study_file, "--output_dir", tmp_path, "--data_dir", held_out]
    result = run(*command, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    done = sorted(path.parent.name for path in tmp_path.glob("runs/*/result.json"))
    assert len(done) == 4 + 2  # two settings of two methods with seed 0, and the better one of each with seed 1
    raw = json.loads((tmp_path / "results.json").read_text())
    assert len(raw["tuning"]) == len(raw["report"]) == 4
    for method in ("clip", "ours_0.5"):
        scores = [r["tasks"]["tiny"]["cosine"] for r in raw["tuning"] if r["method"] == method]
        best = [r["setting"] for r in raw["report"] if r["method"] == method]
        assert set(best) == {scores.index(max(scores))}
    for row in raw["report"]:
        assert row["samples_seen"] == 192 and [p["samples_seen"] for p in row["curve"]] == [96, 192]
        assert ("head_error" in row["partition"]) == (row["method"] == "ours_0.5")
        assert row["calibrated"]["tiny"].keys() == {"cosine", "gallery", "amortized", "before"}
        assert row["partition"]["spread"] > 0 and row["partition"]["batch_error"] > 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 8 * 2 and {row["scoring"] for row in rows} == {"cosine", "gallery"}
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in result.stdout and "| 16 | ours_0.5 | 2 |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples_batch16.png", "training_batch16.png"}
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert sorted(path.stem for path in tmp_path.glob("runs/*.log")) == done  # a method's dot is no suffix

    # Again: nothing is done twice.
    result = run(*command)
    assert result.returncode == 0 and "4 runs, 0 of them to do" in result.stdout

    # With other settings in the YAML, what is there is not taken for their result.
    changed = tmp_path / "changed.yaml"
    changed.write_text(study_file.read_text().replace("learning_rate: [0.001, 0.01]", "learning_rate: [0.001, 0.02]"))
    other = {**yaml.safe_load(study_file.read_text()), "warmup_samples": 48}
    changed.write_text(yaml.safe_dump(other))
    (tmp_path / "runs" / done[0] / "result.json").unlink()
    result = run(command[0], "--config", changed, *command[3:], "--only", "tune")
    assert result.returncode == 1 and "made with other settings" in result.stdout


def test_a_study_that_is_stopped_goes_on_in_the_middle_of_a_run(study_file, held_out, tmp_path):
    study = yaml.safe_load(study_file.read_text())
    study |= {"grid": {}, "methods": {"clip": {"objective": "clip"}}, "seeds": [0], "jobs": 1, "evaluations": 0}
    study["overrides"] = {"num_train_epochs": 30}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    command = ["training/study/study.py", "--config", path, "--output_dir", tmp_path, "--data_dir", held_out]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=with_threads(1), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs/clip-setting0-batch16-seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not (metrics.parent / "result.json").exists()
    stopped = metrics.read_text().count("\n")
    assert 20 < stopped < 180
    result = run(*command)
    assert result.returncode == 0, result.stdout
    assert "Start       step" in metrics.parent.with_suffix(".log").read_text().split("Start       step 0")[-1]
    assert [json.loads(line)["step"] for line in metrics.open()] == list(range(1, 181))


def test_recipes_of_runs(study_file, tmp_path):
    study = harness(study_file, tmp_path, batch_sizes=[16, 32, 96], overrides={"weight_decay": 0.3})
    small, large = (study.recipe(Run("ours_0.5", 1, size, 3)) for size in (16, 96))
    assert large["learning_rate"] == pytest.approx(small["learning_rate"] * math.sqrt(6)) and small["seed"] == 3
    assert small["learning_rate"] == 1e-3 and small["weight_decay"] == 0.3
    assert small["objective_args"] == {"beta": 0.5} and small["amortizer_config"] == {"head_type": "queue", "size": 32}
    for recipe, size in ((small, 16), (large, 96)):
        assert recipe["per_device_train_batch_size"] == size and recipe["samples_per_epoch"] == 96
        assert recipe["warmup_steps"] == 32 // size
    assert len(study.tuning_runs()) == 4 and study.report_runs() == []  # before anything is tuned


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": [36]}, "36"),
        ({"baseline": "clap"}, "did you mean clip"),
        ({"grid": {"learning_rate": [1e-3]}}, "same budget"),
        ({"methods": {"clip": {"objectiv": "clip"}}}, "did you mean methods.clip.objective"),
        ({"development": ["emoji_openmojo"]}, "did you mean emoji_openmoji"),
    ],
)
def test_mistakes_are_named(study_file, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        harness(study_file, tmp_path, **changes)


@pytest.mark.parametrize("name", ["study", "study_demo", "study_batch_sizes"])
def test_studies_of_the_repository_are_valid(name, tmp_path):
    from training.config import PretrainConfig, build
    from training.objectives import OBJECTIVES

    study = Harness(read_study(ROOT / f"training/recipes/{name}.yaml"), tmp_path, Path("data"))
    for method in study.study.methods:
        recipe = study.recipe(Run(method, 0, study.study.sizes(method)[0], 0))
        arguments = build(PretrainConfig, recipe)
        build(OBJECTIVES[arguments.objective].Arguments, arguments.objective_args)


def test_the_tables_numbers():
    def result(value):
        tasks = {"a": {"cosine": value, "gallery": value + 0.01}, "b": {"cosine": value / 2, "gallery": value / 2}}
        partition = {"batch_error": 2.0, "head_error": 0.5}
        scored = {"cosine": value, "gallery": value + 0.01, "amortized": value + 0.02}
        return {
            "tasks": tasks,
            "partition": partition,
            "logit_scale": 20.0,
            "calibrated": {"a": scored, "b": scored},
        }

    scores = {"clip": (0.2, 0.4), "ours": (0.3, 0.5)}
    results = {(name, 64, seed): result(value) for name, values in scores.items() for seed, value in enumerate(values)}
    _, _, clip, ours = results_table(results, ["a"], ["a", "b"], "clip").splitlines()
    assert ours.split(" | ")[3:7] == ["40.00 ± 14.14", "40.00 ± 14.14", "20.00 ± 7.07", "30.00 ± 10.61"]
    # +50 % and +25 %, paired by seed.
    assert ours.split(" | ")[7] == "37.50 ± 17.68 (25.00)" and clip.split(" | ")[7] == ""
    gains = gains_table({**results, ("ours", 256, 0): result(0.1)}, "ours", ["a", "b"]).splitlines()
    assert gains[2:] == ["| clip | 37.50 ± 17.68 (25.00) |  |"]
    assert ours.split(" | ")[8:12] == ["0.50 ± 0.00", "1.00 ± 0.00", "2.00 ± 0.00", "0.25 ± 0.00"]


def test_styles_are_kept_apart(tmp_path):
    import datasets

    command = ["training/study/study_data.py", DEMO / "train.parquet", tmp_path, "--reported", "twemoji"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    trained, reported = (
        datasets.load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train")
        for name in ("study_train", "twemoji")
    )
    assert set(trained["style"]) == {"noto", "fluent-emoji-flat"} and len(trained) + len(reported) == 5118
    everything = datasets.load_dataset("parquet", data_files=str(DEMO / "train.parquet"), split="train")
    captions = [
        caption for caption, style in zip(everything["caption"], everything["style"], strict=True) if style == "twemoji"
    ]
    assert [reported.features["label"].int2str(label) for label in reported["label"]] == captions
    both = "noto+twemoji"  # one set of two styles, with a class for what both call the same
    result = run(*command[:2], tmp_path, "--reported", both)
    assert result.returncode == 0, result.stderr
    joined = datasets.load_dataset("parquet", data_files=str(tmp_path / f"{both}.parquet"), split="train")
    captions = [
        caption
        for caption, style in zip(everything["caption"], everything["style"], strict=True)
        if style in both.split("+")
    ]
    assert len(joined) == len(captions) > joined.features["label"].num_classes == len(set(captions))
    result = run(*command, "--trained", "notto")
    assert result.returncode == 1 and "No pair has the style notto; there are fluent-emoji-flat, noto" in result.stderr
