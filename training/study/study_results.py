"""What a study's runs come to: the measurements of one run, and tables and plots over many."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import yaml

from eval.compare import mean_and_deviation
from eval.plots import lines_with_bands, training_curves
from eval.report import read_evaluations
from eval.tasks import Task


def measure(folder: Path, tasks: list[Task], calibrated: list[str], batch_size: int) -> dict:
    """The result of a finished training run.

    Args:
        tasks: with paths that are complete. calibrated: names of those to fit heads to.
        batch_size: of the batch estimate that the heads are compared with.

    Returns:
        "tasks": main metrics as fractions, {task: {scoring: value}}; "curve": the same by cosine during training;
        "partition": the heads' error against the exact log-partitions over the training set, see
        training/benchmarks/heads.py; "logit_scale": at the end; "calibrated": what eval/apps/calibrate.py brings where
        it is fitted to a half of a task's images, 1000 at most, accuracies over the others, {task: {scoring: value}}.
    """
    import datasets  # late, with torch below: a study that only writes its table need not wait for them
    import torch

    from eval.apps.calibrate import calibrate
    from eval.data import find_data
    from eval.models import load_model
    from eval.runner import evaluate_task
    from modeling_amorlip.configuration_amorlip import AmorLIPAmortizerConfig
    from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
    from training.benchmarks.heads import batch_error, error, exact_log_partitions

    torch.set_num_threads(1)
    model, processor = load_model(str(folder))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result, sizes = {"tasks": {}, "curve": _curve(folder, tasks)}, {}
    for task in tasks:
        entry = evaluate_task(model, processor, task, scorings=("cosine", "gallery"), resamples=0)
        sizes[task] = entry.num_samples
        result["tasks"][task.name] = {name: scores[task.main_metric].value for name, scores in entry.scores.items()}

    recipe = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["arguments"]
    rows = datasets.load_dataset("parquet", data_files=recipe["train_data"], split="train")
    x = encode_images(model, processor, (row[recipe["image_column"]] for row in rows))
    y = encode_texts(model, processor, list(rows[recipe["caption_column"]]))
    scale = model.logit_scale.detach().exp().cpu()
    exact = exact_log_partitions(x, y, scale)
    result["partition"] = {
        "spread": error(torch.zeros_like(exact), exact),
        "batch_error": batch_error(x, y, scale, exact, batch_size),
    }
    last = _lines(folder / "metrics.jsonl")[-1]
    if last.get("partition_error"):  # 0 where no heads are fitted
        with torch.no_grad():
            predictions = torch.stack(model.amortizer.cpu()(x, y, scale))
        result["partition"]["head_error"] = error(predictions, exact)
        result["partition"]["head_bias"] = (predictions - exact).mean().item()
    heads = AmorLIPAmortizerConfig(head_type="prototype", size=256)
    result["calibrated"] = {
        task.name: calibrate(model, processor, find_data(task, folder), heads, min(1000, size // 2), steps=300)
        for task, size in sizes.items()
        if task.name in calibrated
    }
    return result | {"logit_scale": scale.item(), "samples_seen": last["samples_seen"]}


def _curve(folder: Path, tasks: list[Task]) -> list[dict]:
    """[{"samples_seen", task: main metric, ...}, ...] of the evaluations that training did."""
    config = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["arguments"]
    file, points = folder / "eval.jsonl", {}
    for line in read_evaluations(file) if file.exists() else []:
        values = {result.task: result.metrics[result.main_metric].value for result in line.results}
        values = {task.name: values[task.name] for task in tasks}
        points[line.step] = {"samples_seen": line.step * config["per_device_train_batch_size"], **values}
    return list(points.values())


def results_table(
    results: dict[tuple[str, int, int], dict], development: list[str], report: list[str], baseline: str
) -> str:
    """A Markdown table, a row a method and batch size: per cent, mean ± standard deviation over seeds.

    `mean` is that of the report tasks; `over ...` is paired by seed, its lowest seed in brackets. `gallery` are points
    that scoring with exact partition functions adds to the mean. `half, exact` and `half, amortized` are the same over
    the half of each gallery's images that heads were not fitted to, by exact partitions and by those heads. `head /
    batch` is the error of the heads at the end of training, relative to that of a batch's own estimate.

    Args:
        results: of `measure`, by method, batch size and seed.
    """
    extra = [name for name in report if len(report) > 1]
    titles = ["batch", "method", "seeds", "development", *extra, "mean"]
    titles += [f"over {baseline}, %", "gallery", "half, exact", "half, amortized", "head / batch", "logit scale"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for size in sorted({key[1] for key in results}):
        for method in dict.fromkeys(key[0] for key in results if key[1] == size):
            runs = [result for key, result in results.items() if key[:2] == (method, size)]
            partitions = [run["partition"] for run in runs]
            ratios = [part["head_error"] / part["batch_error"] for part in partitions if "head_error" in part]
            groups = (development, *([task] for task in extra), report)
            added = [[score(run, report, "gallery") - score(run, report) for run in runs]]
            for scoring in ("gallery", "amortized"):
                calibrated = ([run["calibrated"][task] for task in report] for run in runs)
                added.append([100 * statistics.mean(v[scoring] - v["cosine"] for v in values) for values in calibrated])
            cells = [size, method, len(runs)]
            cells += [mean_and_deviation([score(run, tasks) for run in runs]) for tasks in groups]
            cells += [_gain(results, method, baseline, size, report) if method != baseline else ""]
            cells += map(mean_and_deviation, added)
            cells += [mean_and_deviation(ratios) if ratios else ""]
            cells += [f"{statistics.mean(run['logit_scale'] for run in runs):.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gains_table(results: dict[tuple[str, int, int], dict], subject: str, report: list[str]) -> str:
    """A Markdown table of what one method gains over each other, a row a method, a column a batch size.

    Per cent of the report tasks' mean, paired by seed: mean ± standard deviation, in brackets the lowest seed's.
    """
    sizes = sorted({key[1] for key in results})
    lines = [f"| {subject} over | " + " | ".join(f"batch {size}, %" for size in sizes) + " |"]
    lines += ["|---" * (1 + len(sizes)) + "|"]
    for method in dict.fromkeys(key[0] for key in results if key[0] != subject):
        gains = (_gain(results, subject, method, size, report) for size in sizes)
        lines.append(f"| {method} | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def score(result: dict, tasks: list[str], scoring: str = "cosine") -> float:
    """Mean main metric of a run's tasks, in per cent."""
    return 100 * statistics.mean(result["tasks"][task][scoring] for task in tasks)


def _gain(results: dict, method: str, baseline: str, size: int, report: list[str]) -> str:
    """What a method gains over another, over the seeds that both have."""
    bases = {key[2]: score(result, report) for key, result in results.items() if key[:2] == (baseline, size)}
    gains = [
        100 * (score(result, report) / bases[key[2]] - 1)
        for key, result in results.items()
        if key[:2] == (method, size) and bases.get(key[2])
    ]
    return f"{mean_and_deviation(gains)} ({min(gains):.2f})" if gains else ""


def draw_results(runs: dict, report: list[str], folder: Path) -> None:
    """Plots of {(method, setting, batch_size, seed): (folder, result)}: accuracy and training curves."""
    sizes = sorted({run.batch_size for run in runs})
    by_size: dict[str, dict[float, list[float]]] = {}
    for run, (_, result) in runs.items():
        by_size.setdefault(run.method, {}).setdefault(run.batch_size, []).append(score(result, report))
    if len(sizes) > 1:
        lines_with_bands(by_size, "batch size", "mean of report tasks, %", folder / "batch_sizes.png")
    for size in sizes:
        of_size = {run: value for run, value in runs.items() if run.batch_size == size}
        curves: dict[str, dict[float, list[float]]] = {}
        for run, (_, result) in of_size.items():
            for point in result["curve"]:
                value = 100 * statistics.mean(point[task] for task in report)
                curves.setdefault(run.method, {}).setdefault(point["samples_seen"], []).append(value)
        if curves:
            lines_with_bands(curves, "samples seen", "mean of report tasks, %", folder / f"samples_batch{size}.png")
        first = {run.method: path / "metrics.jsonl" for run, (path, _) in reversed(of_size.items())}
        training_curves(first, folder / f"training_batch{size}.png")


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
