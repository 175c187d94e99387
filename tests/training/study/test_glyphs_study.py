"""The study on glyphs, on the miniature for a few steps."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from tests.helpers import runs
from tests.helpers.checkout import ROOT
from training.study.study import Harness
from training.study.study_config import build_study
from training.study.study_measure import measure
from training.study.study_results import Run


VALUES = yaml.safe_load((ROOT / "training/study/glyphs_study.yaml").read_text(encoding="utf-8"))
SMALL = {
    "samples_per_epoch": 64,
    "warmup_samples": 16,
    "batch_sizes": [16],
    "tuning_batch_size": 16,
    "overrides": {"num_train_epochs": 2, "log_every": 1},
}


@pytest.fixture(autouse=True)
def threads():
    """Measuring sets the number of threads for its own process, which is this one."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def make_harness(output_dir, **changes) -> Harness:
    return Harness(build_study({**VALUES, **SMALL, **changes}), output_dir, ROOT / "demo_data/glyphs")


def train(harness: Harness, run: Run) -> list[dict]:
    """Train in this process; return the lines of the log."""
    folder = harness.folder(run)
    folder.mkdir(parents=True)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(harness.recipe(run)), encoding="utf-8")
    runs.train(recipe)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", VALUES["methods"])
def test_methods_train_on_the_miniature(method, tmp_path):
    harness = make_harness(tmp_path, evaluations=0)
    lines = train(harness, Run(method, 0, 16, 0))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(abs(line["loss"]) < float("inf") for line in lines) and lines[-1]["skipped_steps"] == 0


@pytest.mark.e2e
def test_run_is_trained_and_measured(tmp_path):
    harness, run = make_harness(tmp_path, evaluations=1, partition_pairs=48), Run("amorlip", 0, 16, 0)
    train(harness, run)
    folder = harness.folder(run)
    result = measure(folder, list(harness.tasks.values()), VALUES["report"], 16, partition_pairs=48)
    assert result.tasks.keys() == set(VALUES["development"]) | set(VALUES["report"])
    assert result.calibrated.keys() == set(VALUES["report"])
    assert [point["samples_seen"] for point in result.curve] == [64, 128] and result.samples_seen == 128
    assert result.partition.keys() == {"spread", "batch_error", "head_error", "head_bias"}
    # Zero, and any number from the 80 pairs of the set on, take all of them.
    everything, eighty = (measure(folder, [], [], 16, partition_pairs=pairs).partition for pairs in (0, 80))
    assert everything == eighty != result.partition


def test_budgets_are_equal_and_reports_are_apart_from_development():
    study = build_study(VALUES)
    assert {len(study.settings(method)) for method in study.methods} == {3}
    assert not set(study.development) & set(study.report)
