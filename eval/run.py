"""Evaluate a model on tasks.

    python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji --output results.json
    python eval/run.py --model USER/MODEL --tasks datacomp --data_dir data --output results.json
    torchrun --standalone --nproc_per_node 8 eval/run.py --model ... (each sample once, over all processes)

Each task's result is written as soon as it is known. The same command again continues with the tasks that are left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from eval.download import download
from eval.evaluators.probes import PROBES
from eval.models import identify_model, load_model
from eval.publish import publish
from eval.report import EVALUATED, Report, print_report, read_report
from eval.runner import RESAMPLES, evaluate_task, unevaluated
from eval.scoring import SCORINGS
from eval.sharding import ProcessShard
from eval.tasks import ROOT, Task, known_tasks, select_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


def run_tasks(
    model: Any, processor: Any, tasks: list[Task], report: Report, arguments: argparse.Namespace, shard: ProcessShard
) -> None:
    """Add a result to the report for each task, and write the report after each."""
    for task in tasks:
        previous = report.tasks.get(task.name)
        if previous is not None and previous.status in EVALUATED:
            if shard.rank == 0:
                print(f"{task.name}: done before, taken over from {arguments.output}")
            continue
        try:
            report.tasks[task.name] = evaluate_task(
                model,
                processor,
                task,
                arguments.data_dir,
                arguments.batch_size,
                tuple(arguments.scoring),
                shard,
                arguments.contact_sheet,
                arguments.bootstrap,
                tuple(arguments.probe),
            )
        except Exception as error:  # the other tasks must not suffer; every process gets here together
            # A UserError is about the data; anything else is a failure of the evaluation.
            status = "missing" if isinstance(error, UserError) else "failed"
            report.tasks[task.name] = unevaluated(task, status, str(error).strip() or type(error).__name__)
        if arguments.output and shard.rank == 0:
            report.write(arguments.output)


def start_report(arguments: argparse.Namespace, model: Any, processor: Any) -> Report:
    """Return an empty report on a model, or the one that an interrupted run of the same left in `--output`."""
    report = Report(
        model=identify_model(arguments.model, model, processor),
        scorings=["cosine", *(name for name in SCORINGS[1:] if name in arguments.scoring)],
        code_version=_code_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    if arguments.output and arguments.output.is_file():
        before = read_report(arguments.output)
        if before.model != report.model or before.scorings != report.scorings:
            raise UserError(f"--output {arguments.output} holds other results than this model's: name another file.")
        report.tasks = before.tasks
    return report


def _code_version() -> str:
    """Return the git revision of this checkout, "unknown" outside of one."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return result.stdout.strip() or "unknown"


def list_tasks() -> None:
    """Print all tasks of tasks.yaml."""
    print(f"{'task':<48} {'groups':<34} {'main metric':<22} {'samples':>8} {'classes':>8} {'random %':>9}")
    for task in known_tasks().values():
        random = "" if task.random_score is None else f"{100 * task.random_score:.2f}"
        groups, classes = " ".join(task.groups), task.num_classes or ""
        print(f"{task.name:<48} {groups:<34} {task.main_metric:<22} {task.size or '':>8} {classes:>8} {random:>9}")


def start_processes() -> tuple[ProcessShard, torch.device]:
    """Return this process's rank, after joining the others of a torchrun, and its device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ProcessShard(), device
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return ProcessShard(state.process_index, state.num_processes), state.device


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options; raise `UserError` for combinations that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Folder or Hub repository of the model; open_clip:NAME/TAG loads one of open_clip's.")
    add("--tasks", nargs="+", help="Tasks or groups of tasks (see --list), or FILE.yaml[:TASK].")
    add("--list", action="store_true", help="List the tasks and stop.")
    add("--download", nargs="+", metavar="TASK", help="Fetch the data of tasks into --data_dir and stop.")
    add("--data_dir", type=Path, default=ROOT, help="Folder of the tasks' data; `hub` streams it from the Hub.")
    add("--output", type=Path, help="JSON file to write; a CSV file and a plot are written beside it.")
    add("--probe", nargs="+", choices=PROBES, default=[], help="Classifiers to fit to a task's training split.")
    scoring_help = (
        "Ways of scoring to report beside cosine: gallery subtracts each candidate's exact log-partition over the "
        "queries from its logits, amortized the model's estimate of it."
    )
    add("--scoring", nargs="+", choices=SCORINGS, default=["cosine"], help=scoring_help)
    add("--contact_sheet", type=Path, help="PNG to draw of images with their five best captions.")
    add("--batch_size", type=int, default=256, help="Images or texts encoded at a time (default: %(default)s).")
    bootstrap_help = "Resamples for confidence intervals, 0 for none (default: %(default)s)."
    add("--bootstrap", type=int, default=RESAMPLES, help=bootstrap_help)
    add("--push_to_hub", metavar="REPO", help="Publish the model's folder with these results.")
    arguments = parser.parse_args()
    if arguments.push_to_hub and not (arguments.output and Path(arguments.model or "").is_dir()):
        raise UserError("--push_to_hub needs --output, and a folder as --model.")
    if not (arguments.list or arguments.download or (arguments.model and arguments.tasks)):
        raise UserError("--model and --tasks are required, or --list, or --download.")
    return arguments


@cli_entry_point
def main() -> int:
    arguments = parse_arguments()
    if arguments.list:
        list_tasks()
        return 0
    if arguments.download:
        download(select_tasks(arguments.download), arguments.data_dir)
        return 0
    tasks = select_tasks(arguments.tasks)
    shard, device = start_processes()
    model, processor = load_model(arguments.model, device=device)
    report = start_report(arguments, model, processor)
    run_tasks(model, processor, tasks, report, arguments, shard)
    if shard.rank == 0:
        if arguments.push_to_hub:
            print(publish(Path(arguments.model), arguments.push_to_hub, arguments.output))
        print_report(report)
    return int(any(report.tasks[task.name].status not in EVALUATED for task in tasks))


if __name__ == "__main__":
    sys.exit(main())
