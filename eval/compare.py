"""Compare finished training runs: mean and standard deviation over the runs that differ in their seed alone.

python eval/compare.py outputs/compare/* --metrics acc1 acc5
python eval/compare.py outputs/clip outputs/amorlip --plots pictures/      # differences to the first run, and curves
python eval/compare.py clip.json amorlip.json --plots pictures/            # the same for results of eval/run.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.plots import difference_bars, radar, training_curves
from eval.report import read_evaluations, read_report, read_run_config
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


DEFAULT_METRICS = ["acc1", "acc5", "text_retrieval_recall@1", "image_retrieval_recall@1"]


@dataclass
class Run:
    """A training run's last evaluation: {metric: value, as a fraction}."""

    objective: str
    seed: int
    metrics: dict[str, float]


def read_run(folder: Path) -> Run:
    """Return the last evaluation of a training run's folder; raise `UserError` when it has none."""
    for name in ("run_config.yaml", "eval.jsonl"):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise UserError(f"{folder} is not a finished and evaluated training run: its {name} is missing or empty.")
    config = read_run_config(folder)
    last = read_evaluations(folder / "eval.jsonl")[-1]
    metrics = {name: metric.value for result in last.results for name, metric in result.metrics.items()}
    return Run(config["objective"], config["seed"], metrics)


def compare(folders: list[Path], metrics: list[str]) -> str:
    """Return a Markdown table, a row per objective: mean ± sample standard deviation over seeds, in per cent."""
    runs: dict[str, dict[int, Run]] = {}
    for folder in folders:
        run = read_run(folder)
        if run.seed in runs.setdefault(run.objective, {}):
            raise UserError(f"{folder} is a second run of {run.objective} with seed {run.seed}; give each seed once.")
        if missing := [metric for metric in metrics if metric not in run.metrics]:
            raise UserError(f"{folder} has no {missing[0]}; its metrics are {', '.join(run.metrics)}.")
        runs[run.objective][run.seed] = run
    lines = ["| objective | seeds | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for objective, seeds in runs.items():
        cells = [mean_and_deviation([100 * run.metrics[metric] for run in seeds.values()]) for metric in metrics]
        lines.append(f"| {objective} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_scores(path: Path) -> dict[str, float]:
    """Return the metrics of a run's folder, or the main metrics of the complete tasks of a results.json."""
    if path.is_dir():
        return read_run(path).metrics
    return {name: result.value for name, result in read_report(path).tasks.items() if result.status == "complete"}


def mean_and_deviation(values: list[float]) -> str:
    """Return mean ± sample standard deviation as text."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def draw(paths: list[Path], folder: Path) -> None:
    """Write differences.png, radar.png for three scores or more, and curves.png for training runs."""
    scores = {path.stem: read_scores(path) for path in paths}
    shared = [name for name in next(iter(scores.values())) if all(name in values for values in scores.values())]
    if len(scores) < 2 or not shared:
        raise UserError(f"--plots needs two runs or more with scores in common; got {', '.join(scores)}.")
    folder.mkdir(parents=True, exist_ok=True)
    percentages = {run: {name: 100 * values[name] for name in shared} for run, values in scores.items()}
    difference_bars(percentages, folder / "differences.png")
    if len(shared) > 2:
        radar(percentages, folder / "radar.png")
    logs = {path.stem: path / "metrics.jsonl" for path in paths if (path / "metrics.jsonl").is_file()}
    if logs:
        training_curves(logs, folder / "curves.png")


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of training runs, or results of eval/run.py.")
    parser.add_argument("--plots", type=Path, help="Folder for plots against the first run, instead of a table.")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, help="Columns of the table.")
    arguments = parser.parse_args()
    if arguments.plots:
        draw(arguments.runs, arguments.plots)
    else:
        print(compare(arguments.runs, arguments.metrics))


if __name__ == "__main__":
    sys.exit(main())
