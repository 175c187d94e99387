"""The results of an evaluation: one schema, written as JSON, CSV, a plot and a table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

from eval.plots import score_bars
from eval.tasks import ROOT, known_tasks


SCHEMA_VERSION = 3


def print_table(results: list[dict]) -> None:
    """What `evaluate` returns as a table, in per cent."""
    print(f"{'task':<20} {'metric':<28} {'value %':>8} {'samples':>8}")
    for result in results:
        print(f"{result['task']:<20} {result['metric']:<28} {100 * result['value']:8.2f} {result['num_samples']:8d}")


def print_report(report: dict) -> None:
    """Tasks with their main metrics by each way of scoring, and aggregates, in per cent."""
    extra = [name for name in report["scoring"] if name != "cosine"]
    print(
        f"{'task':<48} {'metric':<24} {'cosine':>7} {'95 % interval':>15}" + "".join(f" {n:>9}" for n in extra), end=""
    )
    print("  samples")
    for name, entry in report["tasks"].items():
        main = entry["main_metric"]
        if entry["status"] in ("missing", "failed"):
            print(f"{name:<48} {main:<24} {entry['status']}: {entry['reason']}")
            continue
        metric = entry["metrics"][main]
        interval = "{:.2f} - {:.2f}".format(*(100 * v for v in metric["ci95"])) if metric["ci95"] else ""
        others = "".join(
            f" {100 * entry['scoring'][n][main]['value']:9.2f}" if n in entry["scoring"] else f" {'':>9}" for n in extra
        )
        note = f"  ({entry['reason']})" if entry["reason"] else ""
        value = 100 * metric["value"]
        print(f"{name:<48} {main:<24} {value:7.2f} {interval:>15}{others} {entry['num_samples']:8d}{note}")
    for name, value in report["aggregates"].items():
        missing = f"incomplete: {len(value['missing'])} tasks are missing, partial or failed"
        print(f"{name:<73} " + (f"{100 * value['value']:7.2f}" if value["complete"] else missing))


def write_report(report: dict, path: Path) -> None:
    """The report as JSON, and beside it its metrics as CSV and a plot; each is there whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "status", "scoring", "metric", "value", "ci95_low", "ci95_high", "num_samples"])
        for name, entry in report["tasks"].items():
            for scoring, metrics in {"cosine": entry["metrics"], **entry["scoring"]}.items():
                for metric, value in metrics.items():
                    interval = value["ci95"] or ["", ""]
                    writer.writerow(
                        [name, entry["status"], scoring, metric, value["value"], *interval, entry["num_samples"]]
                    )
    os.replace(aside, path.with_suffix(".csv"))
    known, scores = known_tasks(), []
    for name, entry in report["tasks"].items():
        if metric := entry["metrics"].get(entry["main_metric"]):
            scores.append(
                (entry["title"], metric["value"], metric["ci95"], getattr(known.get(name), "random_score", None))
            )
    if scores:
        score_bars(scores, aside.with_suffix(".png"))
        os.replace(aside.with_suffix(".png"), path.with_suffix(".png"))


def _code_version() -> str:
    command = ["git", "rev-parse", "HEAD"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
