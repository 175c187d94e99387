"""Tables and plots of the runs of a study."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.compare import mean_and_deviation
from eval.plots import lines_with_bands, training_curves


class Run(NamedTuple):
    """One training run: a method with one setting of its grid, at a batch size, with a seed."""

    method: str
    setting: int
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-setting{self.setting}-batch{self.batch_size}-seed{self.seed}"


@dataclass
class RunResult:
    """Measurements of one run.

    Args:
        tasks: main metrics as fractions, {task: {scoring: value}}.
        curve: main metrics by cosine during training, [{"samples_seen": ..., task: value}, ...].
        partition: "spread" of the exact log-partitions over the training set, and the errors of a batch's estimate and
            of the fitted heads against them, in nats.
        calibrated: accuracies with heads that eval/apps/calibrate.py fits to half of a task's images (at most 1000),
            over the other images, {task: {scoring: value}}.
        logit_scale: logit scale at the end of training.
        samples_seen: training pairs seen.
    """

    tasks: dict[str, dict[str, float]]
    curve: list[dict[str, float]]
    partition: dict[str, float]
    calibrated: dict[str, dict[str, float]]
    logit_scale: float
    samples_seen: int

    def score(self, tasks: list[str], scoring: str = "cosine") -> float:
        """Return the mean main metric of the tasks, in percent."""
        return 100 * statistics.mean(self.tasks[task][scoring] for task in tasks)

    def calibration_gain(self, tasks: list[str], scoring: str) -> float:
        """Return the mean gain of a scoring over cosine with calibrated heads, in points."""
        return 100 * statistics.mean(self.calibrated[task][scoring] - self.calibrated[task]["cosine"] for task in tasks)


Results = Mapping[Run, RunResult]


def results_table(results: Results, development: list[str], report: list[str], baseline: str) -> str:
    """Return a Markdown table with one row per method and batch size: percent, mean ± standard deviation over seeds.

    Columns: `mean` is the mean of the report tasks. `over ...` is the relative gain, paired by seed, with the lowest
    seed in parentheses. `samples to ...` is the share of the samples after which the mean reaches the baseline's final
    one with the same seed; it is empty unless every seed reaches it. `gallery` is the gain of scoring with exact
    partition functions over the mean, in points. `half, exact` and `half, amortized` are such gains over the half of
    each gallery that heads were not fitted to, with exact partition functions and with these heads. `head / batch` is
    the error of the heads at the end of training divided by the error of a batch's own estimate.
    """
    tasks = report if len(report) > 1 else []
    titles = ["batch", "method", "seeds", "development", *tasks, "mean", f"over {baseline}, %"]
    titles += [f"samples to {baseline}, %", "gallery", "half, exact", "half, amortized", "head / batch", "logit scale"]
    lines = [_row(titles), "|---" * len(titles) + "|"]
    for size in _batch_sizes(results):
        for method in dict.fromkeys(run.method for run in results if run.batch_size == size):
            runs = [result for run, result in results.items() if (run.method, run.batch_size) == (method, size)]
            gain = _gain(results, method, baseline, size, report) if method != baseline else ""
            samples = _samples_to_baseline(results, method, baseline, size, report)
            cells = [size, method, len(runs), *_score_cells(runs, development, tasks, report), gain, samples]
            lines.append(_row(cells + _partition_cells(runs, report)))
    return "\n".join(lines)


def gains_table(results: Results, subject: str, report: list[str]) -> str:
    """Return a Markdown table of one method's gains over every other: a row per method, a column per batch size.

    Percent of the mean of the report tasks, paired by seed: mean ± standard deviation, in parentheses the lowest seed.
    """
    sizes = _batch_sizes(results)
    lines = [_row([f"{subject} over", *(f"batch {size}, %" for size in sizes)]), "|---" * (1 + len(sizes)) + "|"]
    for method in dict.fromkeys(run.method for run in results if run.method != subject):
        lines.append(_row([method, *(_gain(results, subject, method, size, report) for size in sizes)]))
    return "\n".join(lines)


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _batch_sizes(results: Results) -> list[int]:
    return sorted({run.batch_size for run in results})


def _score_cells(runs: list[RunResult], development: list[str], tasks: list[str], report: list[str]) -> list[str]:
    """Return the means of the development tasks, of each single task, and of the report tasks."""
    groups = (development, *([task] for task in tasks), report)
    return [mean_and_deviation([run.score(group) for run in runs]) for group in groups]


def _partition_cells(runs: list[RunResult], report: list[str]) -> list[str]:
    """Return the gains by scoring, the relative error of the heads, and the logit scale."""
    gains = [[run.score(report, "gallery") - run.score(report) for run in runs]]
    gains += [[run.calibration_gain(report, scoring) for run in runs] for scoring in ("gallery", "amortized")]
    partitions = [run.partition for run in runs if "head_error" in run.partition]
    ratios = [partition["head_error"] / partition["batch_error"] for partition in partitions]
    cells = [mean_and_deviation(values) for values in gains]
    return [
        *cells,
        mean_and_deviation(ratios) if ratios else "",
        f"{statistics.mean(run.logit_scale for run in runs):.1f}",
    ]


def _final_scores(results: Results, method: str, size: int, report: list[str]) -> dict[int, float]:
    """Return {seed: mean of the report tasks at the end of the run}."""
    runs = {run.seed: result for run, result in results.items() if (run.method, run.batch_size) == (method, size)}
    return {seed: result.score(report) for seed, result in runs.items()}


def _gain(results: Results, method: str, baseline: str, size: int, report: list[str]) -> str:
    """Return the relative gain of a method over another, over the seeds that both have."""
    bases = _final_scores(results, baseline, size, report)
    scores = _final_scores(results, method, size, report)
    gains = [100 * (score / bases[seed] - 1) for seed, score in scores.items() if bases.get(seed)]
    return f"{mean_and_deviation(gains)} ({min(gains):.2f})" if gains else ""


def _samples_to_baseline(results: Results, method: str, baseline: str, size: int, report: list[str]) -> str:
    """Return the share of the samples, in percent, after which a method reaches the baseline's final score."""
    bases = _final_scores(results, baseline, size, report)
    shares = [
        _samples_to_reach(bases[run.seed], result, report)
        for run, result in results.items()
        if (run.method, run.batch_size) == (method, size) and run.seed in bases
    ]
    reached = [100 * share for share in shares if share is not None]
    return mean_and_deviation(reached) if method != baseline and reached and len(reached) == len(shares) else ""


def _samples_to_reach(target: float, result: RunResult, report: list[str]) -> float | None:
    """Return the share of a run's samples after which its score reaches a target, interpolated between evaluations."""
    points = [(point["samples_seen"], 100 * statistics.mean(point[task] for task in report)) for point in result.curve]
    for (before, low), (after, high) in itertools.pairwise([(0, 0.0), *points]):
        if high >= target:
            part = (target - low) / (high - low) if high > low else 0.0
            return (before + (after - before) * part) / result.samples_seen
    return None


def results_json(chosen: dict[str, dict[str, Any]], tuning: Results, report: Results) -> str:
    """Return the chosen settings and all raw results as JSON, one run per line."""
    rows = {
        phase: ",\n".join(json.dumps(run._asdict() | dataclasses.asdict(result)) for run, result in results.items())
        for phase, results in (("tuning", tuning), ("report", report))
    }
    phases = ",\n".join(f'"{phase}": [\n{lines}\n]' for phase, lines in rows.items())
    return f'{{"chosen": {json.dumps(chosen)},\n{phases}}}\n'


def write_csv(path: Path, tuning: Results, report: Results) -> None:
    """Write one line per run, task and scoring."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", *Run._fields, "task", "scoring", "value"])
        for phase, results in (("tuning", tuning), ("report", report)):
            for run, result in results.items():
                for task, values in result.tasks.items():
                    writer.writerows([phase, *run, task, scoring, value] for scoring, value in values.items())


def draw_results(results: Results, folders: dict[Run, Path], report: list[str], output_dir: Path) -> None:
    """Plot accuracy against batch size and against samples seen, and training curves of each method's first run."""
    label = "mean of report tasks, %"
    by_size: dict[str, dict[float, list[float]]] = {}
    for run, result in results.items():
        by_size.setdefault(run.method, {}).setdefault(run.batch_size, []).append(result.score(report))
    sizes = _batch_sizes(results)
    if len(sizes) > 1:
        lines_with_bands(by_size, "batch size", label, output_dir / "batch_sizes.png")
    for size in sizes:
        runs = [run for run in results if run.batch_size == size]
        curves: dict[str, dict[float, list[float]]] = {}
        for run in runs:
            for point in results[run].curve:
                value = 100 * statistics.mean(point[task] for task in report)
                curves.setdefault(run.method, {}).setdefault(point["samples_seen"], []).append(value)
        if curves:
            lines_with_bands(curves, "samples seen", label, output_dir / f"samples_batch{size}.png")
        logs = {run.method: folders[run] / "metrics.jsonl" for run in reversed(runs)}
        training_curves(logs, output_dir / f"training_batch{size}.png")
