"""Evaluates a model on tasks.

    python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji --output results.json
    python eval/run.py --model USER/MODEL --tasks datacomp --data_dir data --output results.json
    torchrun --standalone --nproc_per_node 8 eval/run.py --model ... (each sample once, over all processes)

Each task's result is written as soon as it is there. The same command again goes on with the tasks that are not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from eval.download import download
from eval.evaluators.probes import PROBES
from eval.models import load_model, revision
from eval.publish import publish
from eval.report import SCHEMA_VERSION, _code_version, print_report, write_report
from eval.runner import RESAMPLES, ProcessShard, evaluate_task
from eval.scoring import SCORINGS
from eval.tasks import ROOT, Task, aggregate, known_tasks, select_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


def run_tasks(
    model, processor, tasks: list[Task], report: dict, arguments: argparse.Namespace, share: ProcessShard
) -> None:
    """Fills in the report task by task, and writes it after each."""
    for task in tasks:
        done = report["tasks"].get(task.name, {}).get("status")
        if done in ("complete", "partial"):
            if share.rank == 0:
                print(f"{task.name}: done before, taken over from {arguments.output}")
            continue
        try:
            entry = evaluate_task(
                model,
                processor,
                task,
                arguments.data_dir,
                arguments.batch_size,
                tuple(arguments.scoring),
                share,
                arguments.contact_sheet,
                arguments.bootstrap,
                tuple(arguments.probe),
            )
        except Exception as error:  # one task's trouble is not to cost the others
            # What the data lacks is missing; anything else failed. Every process comes to the same end.
            status = "missing" if isinstance(error, UserError) else "failed"
            entry = {
                "title": task.title,
                "status": status,
                "reason": f"{str(error).strip() or type(error).__name__}",
                "dataset": {"name": task.repositories[0] if task.repositories else task.data, "split": task.split},
                "num_samples": 0,
                "expected_samples": task.size,
                "main_metric": task.main_metric,
                "metrics": {},
                "scoring": {},
            }
        report["tasks"][task.name] = entry
        complete = {
            name: entry["metrics"][entry["main_metric"]]["value"] if entry["status"] == "complete" else None
            for name, entry in report["tasks"].items()
        }
        report["aggregates"] = aggregate(complete)
        if arguments.output and share.rank == 0:
            write_report(report, arguments.output)


def new_report(arguments: argparse.Namespace, model) -> dict:
    """An empty report on a model, or the one that an interrupted run of the same left in `--output`."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": arguments.model,
            "revision": revision(arguments.model, model),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "code_version": _code_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scoring": ["cosine", *(name for name in SCORINGS[1:] if name in arguments.scoring)],
        "probes": sorted(arguments.probe),
        "tasks": {},
        "aggregates": {},
    }
    if arguments.output and arguments.output.is_file():
        try:
            before = json.loads(arguments.output.read_text(encoding="utf-8"))
            same = all(before[key] == report[key] for key in ("schema_version", "model", "scoring", "probes"))
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"--output {arguments.output} holds something else than results of this model: name another."
            )
        report["tasks"] = before["tasks"]
    return report


def list_tasks() -> None:
    print(f"{'task':<48} {'groups':<34} {'main metric':<22} {'samples':>8} {'classes':>8} {'random %':>9}")
    for task in known_tasks().values():
        random = "" if task.random_score is None else f"{100 * task.random_score:.2f}"
        groups, classes = " ".join(task.groups), task.num_classes or ""
        print(f"{task.name:<48} {groups:<34} {task.main_metric:<22} {task.size:8d} {classes:>8} {random:>9}")


@cli_entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or Hub repository; open_clip:NAME/TAG takes open_clip's where installed"
    )
    parser.add_argument("--tasks", nargs="+", help="tasks or groups (see --list), or FILE.yaml[:TASK]")
    parser.add_argument("--list", action="store_true", help="list the tasks and stop")
    parser.add_argument("--download", nargs="+", metavar="TASK", help="fetch tasks' data into --data_dir and stop")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=ROOT,
        help="folder that the tasks' data is in; `hub` reads the Hub's, by shards",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, and a CSV file and a plot beside it")
    parser.add_argument(
        "--probe", nargs="+", choices=PROBES, default=[], help="classifiers to fit to image embeddings of train splits"
    )
    parser.add_argument(
        "--scoring",
        nargs="+",
        choices=SCORINGS,
        default=["cosine"],
        help="ways of scoring to report beside cosine: gallery takes each candidate's exact log-partition over the "
        "queries off its logits, amortized the model's estimate of it",
    )
    parser.add_argument("--contact_sheet", type=Path, help="PNG of images with their five best captions to draw")
    parser.add_argument("--batch_size", type=int, default=256, help="images or texts encoded at a time")
    parser.add_argument("--bootstrap", type=int, default=RESAMPLES, help="resamples for confidence intervals; 0: none")
    parser.add_argument("--push_to_hub", metavar="REPO", help="publish the model's folder with these results")
    arguments = parser.parse_args()
    if arguments.push_to_hub and not (arguments.output and Path(arguments.model or "").is_dir()):
        raise UserError("--push_to_hub needs --output, and a folder as --model.")
    if arguments.list:
        list_tasks()
        return 0
    if arguments.download:
        download(select_tasks(arguments.download), arguments.data_dir)
        return 0
    if not arguments.model or not arguments.tasks:
        raise UserError("--model and --tasks are needed (or --list, or --download).")
    tasks = select_tasks(arguments.tasks)
    share, device = ProcessShard(), "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        share, device = ProcessShard(state.process_index, state.num_processes), state.device
    model, processor = load_model(arguments.model)
    report = new_report(arguments, model)
    run_tasks(model.to(device), processor, tasks, report, arguments, share)
    if arguments.push_to_hub and share.rank == 0:
        print(publish(Path(arguments.model), arguments.push_to_hub, arguments.output))
    if share.rank == 0:
        print_report(report)
    return int(any(report["tasks"][task.name]["status"] in ("missing", "failed") for task in tasks))


if __name__ == "__main__":
    sys.exit(main())
