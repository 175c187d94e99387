"""Compares finished training runs: mean and standard deviation over the runs that differ in nothing but their seed.

python eval/compare.py outputs/compare/* --metrics acc1 acc5
python eval/compare.py outputs/clip outputs/amorlip --plots pictures/      # differences to the first, and curves
python eval/compare.py clip.json amorlip.json --plots pictures/            # the same of eval/run.py's results
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from eval.plots import difference_bars, radar, training_curves
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


DEFAULT_METRICS = ["acc1", "acc5", "text_retrieval_recall@1", "image_retrieval_recall@1", "pixel_baseline_acc1"]


def read_run(folder: Path) -> tuple[str, int, dict[str, float]]:
    """(objective, seed, {metric: last value}) of a training run's folder; raises `UserError` when it has no results."""
    for name in ("run_config.yaml", "eval.jsonl"):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise UserError(f"{folder} is not a finished and evaluated training run: its {name} is missing or empty.")
    settings = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))
    settings = settings.get("arguments", settings)  # earlier versions wrote settings under a key
    last = (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return settings["objective"], settings["seed"], {r["metric"]: r["value"] for r in json.loads(last)["results"]}


def compare(folders: list[Path], metrics: list[str]) -> str:
    """A Markdown table, a row an objective: each metric's mean ± sample standard deviation over seeds, in per cent."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for folder in folders:
        objective, seed, values = read_run(folder)
        if seed in runs.setdefault(objective, {}):
            raise UserError(f"{folder} is a second run of {objective} with seed {seed}; give each seed once.")
        if missing := [metric for metric in metrics if metric not in values]:
            raise UserError(f"{folder} has no {missing[0]}; its metrics are {', '.join(values)}.")
        runs[objective][seed] = values
    lines = ["| objective | seeds | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for objective, seeds in runs.items():
        cells = [mean_and_deviation([100 * values[metric] for values in seeds.values()]) for metric in metrics]
        lines.append(f"| {objective} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores_of(path: Path) -> dict[str, float]:
    """Metrics of a run's folder, or the main metrics of the complete tasks of a results.json."""
    if path.is_dir():
        return read_run(path)[2]
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"].items()
        return {k: t["metrics"][t["main_metric"]]["value"] for k, t in tasks if t["status"] == "complete"}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is neither a training run's folder nor what eval/run.py writes.") from None


def mean_and_deviation(values: list[float]) -> str:
    """mean ± sample standard deviation, as text."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def draw(paths: list[Path], folder: Path) -> None:
    """Writes differences.png, with three scores or more radar.png, and curves.png where training runs are compared."""
    scores = {path.stem: scores_of(path) for path in paths}
    shared = [name for name in next(iter(scores.values())) if all(name in values for values in scores.values())]
    if len(scores) < 2 or not shared:
        raise UserError(f"--plots needs two runs or more with scores in common; got {', '.join(scores)}.")
    folder.mkdir(parents=True, exist_ok=True)
    shown = {run: {name: 100 * values[name] for name in shared} for run, values in scores.items()}
    difference_bars(shown, folder / "differences.png")
    if len(shared) > 2:
        radar(shown, folder / "radar.png")
    logs = {path.stem: path / "metrics.jsonl" for path in paths if (path / "metrics.jsonl").is_file()}
    if logs:
        training_curves(logs, folder / "curves.png")


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of training runs, or results of eval/run.py")
    parser.add_argument("--plots", type=Path, help="folder for plots of the runs against the first, instead of a table")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, help="columns of the table")
    arguments = parser.parse_args()
    if arguments.plots:
        draw(arguments.runs, arguments.plots)
    else:
        print(compare(arguments.runs, arguments.metrics))


if __name__ == "__main__":
    sys.exit(main())
