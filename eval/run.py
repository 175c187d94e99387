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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from eval.download import download
from eval.evaluators.probes import PROBES
from eval.identity import is_of_model
from eval.models import identify_model, load_model
from eval.publish import check_repo_id, publish
from eval.report import EVALUATED, Report, check_writable, print_report, read_report
from eval.runner import RESAMPLES, EvaluationOptions, evaluate_task, unevaluated
from eval.scoring import SCORINGS, SinkhornSettings, scoring_name
from eval.sharding import ProcessShard
from eval.tasks import ROOT, Task, known_tasks, select_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_WORKERS = 8


def run_tasks(
    model: Any, processor: Any, tasks: list[Task], report: Report, arguments: argparse.Namespace, shard: ProcessShard
) -> None:
    """Add a result to the report for each task, and write the report after each."""
    for task in tasks:
        previous = report.tasks.get(task.name)
        options = EvaluationOptions(
            num_workers=arguments.num_workers,
            dtype=DTYPES[arguments.dtype],
            sinkhorn=SinkhornSettings(arguments.sinkhorn_iterations, arguments.sinkhorn_temperature),
            model_record=report.model,
            previous=previous if previous is not None and previous.status in EVALUATED else None,
        )
        try:
            result = evaluate_task(
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
                options=options,
            )
            if shard.rank == 0 and previous is not None and result is options.previous:
                print(f"{task.name}: done before, taken over from {arguments.output}")
        except Exception as error:  # the other tasks must not suffer; every process gets here together
            # A UserError is about the data; anything else is a failure of the evaluation.
            status = "missing" if isinstance(error, UserError) else "failed"
            result = unevaluated(task, status, str(error).strip() or type(error).__name__)
        report.tasks[task.name] = result
        if arguments.output and shard.rank == 0:
            report.write(arguments.output, plot=task is tasks[-1])


def start_report(arguments: argparse.Namespace, model: Any, processor: Any) -> Report:
    """Return an empty report on a model, or one with the results of this very model that `--output` holds.

    Whether one of those is of the same task, data and settings is decided when it is the task's turn.

    Raises:
        UserError: `--output` holds something else, or results of a model with another name.
    """
    report = Report(
        model=identify_model(arguments.model, model, processor, arguments.revision),
        scorings=[name for name in SCORINGS if name in ("cosine", *arguments.scoring)],
        code_version=_code_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if arguments.output and arguments.output.is_file():
        before = read_report(arguments.output)
        if before.model.name != report.model.name:
            raise UserError(f"--output {arguments.output} holds results of {before.model.name}: name another file.")
        report.tasks = {
            name: result for name, result in before.tasks.items() if is_of_model(result.identity, report.model)
        }
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


def start_processes(name: str | None) -> tuple[ProcessShard, torch.device]:
    """Return this process's rank, after joining the others of a torchrun, and its device.

    Args:
        name: Device that was asked for; by default a GPU, or the CPU where there is none.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if is_alone:  # several processes each get a device of their own below
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if is_alone:
        return ProcessShard(), device
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return ProcessShard(state.process_index, state.num_processes), state.device


def default_workers() -> int:
    """Return the number of processes that read images: the cores per process, but one for the model, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


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
        "Ways of scoring to report beside cosine: exact subtracts each candidate's log-partition over the queries from "
        "its logits, amortized the model's estimate of it, sinkhorn balances queries and candidates. exact and "
        "sinkhorn are transductive: they use all queries of the test set to score each of them."
    )
    add("--scoring", nargs="+", type=scoring_name, choices=SCORINGS, default=["cosine"], help=scoring_help)
    iterations_help = "Iterations of Sinkhorn scoring (default: %(default)s)."
    add("--sinkhorn_iterations", type=int, default=SinkhornSettings.iterations, help=iterations_help)
    temperature_help = "Temperature that divides the logits of Sinkhorn scoring (default: %(default)s)."
    add("--sinkhorn_temperature", type=float, default=SinkhornSettings.temperature, help=temperature_help)
    add("--contact_sheet", type=Path, help="PNG to draw of images with their five best captions.")
    add("--device", help="Device to encode on, such as cpu or cuda:1 (default: a GPU where there is one).")
    dtype_help = "Type to compute embeddings in, under autocast (default: %(default)s)."
    add("--dtype", choices=DTYPES, default="float32", help=dtype_help)
    add("--revision", help="Branch, tag or commit of a model on the Hub (default: main).")
    workers_help = "Processes that read images, per process; 0 uses a thread (default: %(default)s)."
    add("--num_workers", type=int, default=default_workers(), help=workers_help)
    add("--batch_size", type=int, default=256, help="Images or texts encoded at a time (default: %(default)s).")
    bootstrap_help = "Resamples for confidence intervals, 0 for none (default: %(default)s)."
    add("--bootstrap", type=int, default=RESAMPLES, help=bootstrap_help)
    add("--push_to_hub", metavar="REPO", help="Publish the model's folder with these results.")
    arguments = parser.parse_args()
    if arguments.push_to_hub and not (arguments.output and Path(arguments.model or "").is_dir()):
        raise UserError("--push_to_hub needs --output, and a folder as --model.")
    if arguments.push_to_hub:
        check_repo_id(arguments.push_to_hub)
    if not (arguments.list or arguments.download or (arguments.model and arguments.tasks)):
        raise UserError("--model and --tasks are required, or --list, or --download.")
    for name, minimum in (("batch_size", 1), ("bootstrap", 0), ("num_workers", 0)):
        if getattr(arguments, name) < minimum:
            raise UserError(f"--{name} must be at least {minimum}, got {getattr(arguments, name)}.")
    return arguments


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raise `UserError` when a file that is to be written at the end cannot be, before the work."""
    if arguments.output:
        for suffix in (arguments.output.suffix, ".csv", ".png"):
            check_writable("--output", arguments.output.with_suffix(suffix))
    if arguments.contact_sheet:
        check_writable("--contact_sheet", arguments.contact_sheet)


@cli_entry_point
def main() -> int:
    # Workers that read images are forked, and use no tokenizer; said outright, it costs no warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = parse_arguments()
    if arguments.list:
        list_tasks()
        return 0
    if arguments.download:
        download(select_tasks(arguments.download), arguments.data_dir)
        return 0
    tasks = select_tasks(arguments.tasks)
    SinkhornSettings(arguments.sinkhorn_iterations, arguments.sinkhorn_temperature)  # refuses wrong values
    shard, device = start_processes(arguments.device)
    if shard.rank == 0:
        check_outputs(arguments)
    model, processor = load_model(arguments.model, device=device, revision=arguments.revision)
    report = start_report(arguments, model, processor)
    run_tasks(model, processor, tasks, report, arguments, shard)
    if shard.rank == 0:
        if arguments.push_to_hub:
            print(publish(Path(arguments.model), arguments.push_to_hub, arguments.output))
        print_report(report)
    return int(any(report.tasks[task.name].status not in EVALUATED for task in tasks))


if __name__ == "__main__":
    sys.exit(main())
