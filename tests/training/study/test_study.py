"""The study harness: choice of settings, continuation, and its results."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import DEMO, ROOT, TINY, run, start_forked
from training.config import PretrainConfig, build
from training.objectives import OBJECTIVES
from training.study import study as study_script
from training.study.study import Harness
from training.study.study_config import build_study, read_study
from training.study.study_results import Run, RunResult


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with a task of 40 images, described by a YAML file, and 100 pairs to train on."""
    folder = tmp_path_factory.mktemp("study_data")
    for source, target, rows in (("openmoji", "held_out", 40), ("train", "pairs", 100)):
        table = datasets.load_dataset("parquet", data_files=str(DEMO / f"{source}.parquet"), split="train")
        table.select(range(rows)).to_parquet(folder / f"{target}.parquet")
    task = {"data": "held_out.parquet", "texts": str(DEMO / "openmoji.json")}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tiny": task}))
    base = {**TINY, "train_data": "pairs.parquet", "num_train_epochs": 2, "checkpoint_every": 2, "objective_args": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base))
    return folder


@pytest.fixture
def values(data_dir):
    """A study of two methods with two settings each, and two seeds."""
    return {
        "recipe": str(data_dir / "recipe.yaml"),
        "tasks": str(data_dir / "tasks.yaml"),
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


def make_result(value: float) -> RunResult:
    return RunResult(
        tasks={"tiny": {"cosine": value, "gallery": value + 0.01}},
        curve=[{"samples_seen": 96, "tiny": value / 2}],
        partition={"spread": 1.0, "batch_error": 2.0},
        calibrated={"tiny": {"cosine": value, "gallery": value, "amortized": value, "before": value}},
        logit_scale=20.0,
        samples_seen=192,
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training and measuring: a score is 10 times the run's learning rate. Returns the recipes trained."""
    recipes = []

    def train(self, recipe, folder, log):
        recipes.append(yaml.safe_load(recipe.read_text()))
        line = {"step": 1, "loss": 1.0, "logit_scale": 20.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "checkpoints").mkdir()
        log.write_text("")
        return True

    def measure(self, folder):
        return make_result(10 * yaml.safe_load(folder.with_name(f"{folder.name}.yaml").read_text())["learning_rate"])

    monkeypatch.setattr(Harness, "_train", train)
    monkeypatch.setattr(Harness, "_measure", measure)
    return recipes


@pytest.fixture
def main(monkeypatch, data_dir, tmp_path):
    """Runs the command line in this process: main(study, option, ...) -> exit status."""

    def call(study, *options):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        monkeypatch.setattr(study_script.signal, "signal", lambda *_: None)
        command = ["--config", tmp_path / "study.yaml", "--output_dir", tmp_path / "out", "--data_dir", data_dir]
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, [*command, *options])])
        return study_script.main()

    return call


def test_tuning_selects_best_setting(values, main, trained, tmp_path, capsys):
    assert main(values) == 0
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out and "| 16 | ours_0.5 | 2 |" in table
    # Two settings of two methods with seed 0, and the better one of each with seed 1.
    assert sorted((r["objective"], r["learning_rate"], r["seed"]) for r in trained) == sorted(
        (objective, rate, seed) for objective in ("clip", "amorlip") for rate, seed in ((1e-3, 0), (1e-2, 0), (1e-2, 1))
    )
    raw = json.loads((out / "results.json").read_text())
    assert {r["method"]: r["setting"] for r in raw["report"]} == {"clip": 1, "ours_0.5": 0}
    assert raw["chosen"]["ours_0.5"] == {"learning_rate": 1e-2, "objective_args.beta": 0.5}
    assert len(raw["tuning"]) == len(raw["report"]) == 4
    assert raw["report"][0]["tasks"] == {"tiny": {"cosine": 0.1, "gallery": 0.1 + 0.01}}
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8 * 2 and {row["scoring"] for row in rows} == {"cosine", "gallery"}
    assert {path.name for path in out.glob("*.png")} == {"samples_batch16.png", "training_batch16.png"}
    assert not list(out.glob("runs/*/checkpoints"))
    done = sorted(path.parent.name for path in out.glob("runs/*/result.json"))
    assert sorted(path.stem for path in out.glob("runs/*.log")) == done  # the dot of a method's name stays


def test_finished_runs_are_kept(values, main, trained, capsys):
    assert main(values) == 0 and len(trained) == 6
    assert main(values) == 0 and len(trained) == 6
    assert "4 runs, 0 to do" in capsys.readouterr().out


def test_run_with_other_settings_is_refused(values, main, trained, tmp_path, capsys):
    assert main(values, "--only", "tune") == 0
    (tmp_path / "out/runs/clip-setting0-batch16-seed0/result.json").unlink()
    assert main({**values, "warmup_samples": 48}, "--only", "tune") == 1
    assert "holds a run with other settings" in capsys.readouterr().out and len(trained) == 4


@pytest.mark.e2e
def test_stopped_study_resumes_inside_a_run(values, data_dir, tmp_path):
    methods = {"ours": {**values["methods"]["ours_0.5"], "grid": {}}}
    study = {**values, "grid": {}, "methods": methods, "seeds": [0], "jobs": 1, "baseline": "ours"}
    study["overrides"] = {"num_train_epochs": 12}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = ["training/study/study.py", "--config", tmp_path / "study.yaml", "--output_dir", tmp_path]
    command += ["--data_dir", data_dir]
    (process,) = start_forked(*command, output=tmp_path / "output")
    folder = tmp_path / "runs/ours-setting0-batch16-seed0"
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 10):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.2)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and not (folder / "result.json").exists()
    assert 10 < metrics.read_text().count("\n") < 72
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [json.loads(line)["step"] for line in metrics.open()] == list(range(1, 73))
    starts = [line for line in folder.with_suffix(".log").read_text().splitlines() if line.startswith("Start ")]
    assert len(starts) == 2 and starts[0].split()[1:3] == ["step", "0"] and int(starts[1].split()[2]) > 10
    (row,) = json.loads((tmp_path / "results.json").read_text())["report"]
    assert row["samples_seen"] == 72 * 16 and [p["samples_seen"] for p in row["curve"]] == [36 * 16, 72 * 16]
    assert row["calibrated"]["tiny"].keys() == {"cosine", "gallery", "amortized", "before"}
    assert row["partition"].keys() == {"spread", "batch_error", "head_error", "head_bias"}


def make_harness(values, data_dir, output_dir, **changes) -> Harness:
    return Harness(build_study({**values, **changes}), output_dir, data_dir)


def test_recipes_scale_with_batch_size(values, data_dir, tmp_path):
    harness = make_harness(values, data_dir, tmp_path, batch_sizes=[16, 32, 96], overrides={"weight_decay": 0.3})
    small, large = (harness.recipe(Run("ours_0.5", 1, size, 3)) for size in (16, 96))
    assert large["learning_rate"] == pytest.approx(small["learning_rate"] * math.sqrt(6)) and small["seed"] == 3
    assert small["learning_rate"] == 1e-3 and small["weight_decay"] == 0.3
    assert small["objective_args"] == {"beta": 0.5} and small["amortizer_config"] == {"head_type": "queue", "size": 32}
    for recipe, size in ((small, 16), (large, 96)):
        assert recipe["per_device_train_batch_size"] == size and recipe["samples_per_epoch"] == 96
        assert recipe["warmup_steps"] == 32 // size
    assert len(harness.tuning_runs()) == 4 and harness.report_runs() == []  # nothing is tuned yet


def test_methods_may_have_batch_sizes_and_seeds_of_their_own(values, data_dir, tmp_path):
    methods = {"clip": {"objective": "clip"}, "dcl": {"objective": "dcl", "batch_sizes": [32], "seeds": [1]}}
    changes = {
        "methods": methods,
        "baseline": "clip",
        "subject": None,
        "grid": {},
        "batch_sizes": [16],
        "seeds": [0, 1],
    }
    runs = make_harness(values, data_dir, tmp_path, **changes).report_runs()
    assert [tuple(run) for run in runs] == [("clip", 0, 16, 0), ("clip", 0, 16, 1), ("dcl", 0, 32, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [36]}, "36"),
        ({"baseline": "clap"}, "did you mean clip"),
        ({"grid": {"learning_rate": [1e-3]}}, "same budget"),
        ({"methods": {"clip": {"objectiv": "clip"}}}, "did you mean methods.clip.objective"),
        ({"development": ["emoji_openmojo"]}, "did you mean emoji_openmoji"),
    ],
)
def test_invalid_studies_raise(values, data_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_harness(values, data_dir, tmp_path, **changes)


def test_unreadable_config_raises(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- clip\n")
    with pytest.raises(UserError, match="is not a study"):
        read_study(tmp_path / "list.yaml")


STUDIES = [
    path
    for path in sorted((ROOT / "training/study").glob("*.yaml"))
    if not path.stem.endswith("_tasks") and not path.stem.endswith("_recipe")
]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_are_valid(path, tmp_path):
    harness = Harness(read_study(path), tmp_path, Path("data"))
    for method in harness.study.methods:
        for setting in range(len(harness.study.settings(method))):
            recipe = harness.recipe(Run(method, setting, harness.study.batch_sizes_of(method)[0], 0))
            config = build(PretrainConfig, recipe)
            build(OBJECTIVES[config.objective].Arguments, config.objective_args)


def test_fresh_seeds_use_the_settings_of_the_study(tmp_path):
    """The recipes differ from study.yaml's chosen ones by their seeds and folders only."""
    fresh = Harness(read_study(ROOT / "training/study/study_fresh_seeds.yaml"), tmp_path, Path("data"))
    study = Harness(read_study(ROOT / "training/study/study.yaml"), tmp_path, Path("data"))
    chosen = json.loads((ROOT / "training/study/results/study.json").read_text())["chosen"]
    results = json.loads((ROOT / "training/study/results/fresh_seeds.json").read_text())
    assert [(r["method"], r["batch_size"], r["seed"]) for r in results["report"]] == [
        (run.method, run.batch_size, run.seed) for run in fresh.report_runs()
    ]
    for method in fresh.study.methods:
        assert fresh.study.settings(method) == [results["chosen"][method]] == [chosen[method]]
        setting = study.study.settings(method).index(chosen[method])
        ours, theirs = fresh.recipe(Run(method, 0, 64, 3)), study.recipe(Run(method, setting, 64, 3))
        assert {**ours, "output_dir": ""} == {**theirs, "output_dir": ""}
