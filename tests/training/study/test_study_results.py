"""Numbers of a study's tables."""

from __future__ import annotations

import json

import pytest

from tests.helpers.checkout import ROOT
from training.study.study_results import Run, RunResult, gains_table, results_json, results_table


def make_result(value: float) -> RunResult:
    scores = {"cosine": value, "gallery": value + 0.01, "amortized": value + 0.02}
    return RunResult(
        tasks={"a": {"cosine": value, "gallery": value + 0.01}, "b": {"cosine": value / 2, "gallery": value / 2}},
        curve=[{"samples_seen": seen, "a": value * seen / 4, "b": value * seen / 8} for seen in (2, 4)],
        partition={"batch_error": 2.0, "head_error": 0.5},
        calibrated={"a": scores, "b": scores},
        logit_scale=20.0,
        samples_seen=4,
    )


@pytest.fixture
def results():
    scores = {"clip": (0.2, 0.4), "ours": (0.3, 0.5)}
    return {Run(m, 0, 64, seed): make_result(v) for m, values in scores.items() for seed, v in enumerate(values)}


def test_results_table(results):
    _, _, clip, ours = results_table(results, ["a"], ["a", "b"], "clip").splitlines()
    assert ours.split(" | ")[3:7] == ["40.00 ± 14.14", "40.00 ± 14.14", "20.00 ± 7.07", "30.00 ± 10.61"]
    # +50 % and +25 %, paired by seed.
    assert ours.split(" | ")[7] == "37.50 ± 17.68 (25.00)" and clip.split(" | ")[7] == ""
    # The lines to 0.3 and 0.5 pass 0.2 and 0.4 after 2/3 and 4/5.
    assert ours.split(" | ")[8] == "73.33 ± 9.43" and clip.split(" | ")[8] == ""
    assert ours.split(" | ")[9:13] == ["0.50 ± 0.00", "1.00 ± 0.00", "2.00 ± 0.00", "0.25 ± 0.00"]


def test_samples_to_a_score_that_a_seed_does_not_reach(results):
    table = results_table({**results, Run("ours", 0, 64, 1): make_result(0.3)}, ["a"], ["a", "b"], "clip")
    assert table.splitlines()[3].split(" | ")[8] == ""


def test_a_score_of_nothing_is_reached_at_the_start():
    runs = {Run(method, 0, 64, 0): make_result(0.0) for method in ("clip", "ours")}
    assert results_table(runs, ["a"], ["a", "b"], "clip").splitlines()[3].split(" | ")[8] == "0.00"


def test_gains_table(results):
    gains = gains_table({**results, Run("ours", 0, 256, 0): make_result(0.1)}, "ours", ["a", "b"]).splitlines()
    assert gains[2:] == ["| clip | 37.50 ± 17.68 (25.00) |  |"]


@pytest.mark.parametrize("name", ["study", "batch_sizes", "fresh_seeds", "glyphs_fixed_settings"])
def test_committed_results_round_trip(name):
    """The writer gives the committed files again, byte for byte."""
    text = (ROOT / f"training/study/results/{name}.json").read_text()
    raw = json.loads(text)
    phases = {}
    for phase in ("tuning", "report"):
        rows = [dict(row) for row in raw[phase]]
        phases[phase] = {Run(*(row.pop(field) for field in Run._fields)): RunResult(**row) for row in rows}
    assert results_json(raw["chosen"], phases["tuning"], phases["report"]) == text
