"""Evaluates a model on tasks.

    python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji --output results.json
    python eval/run.py --model USER/MODEL --tasks datacomp --data_dir data --output results.json
    torchrun --standalone --nproc_per_node 8 eval/run.py --model ... (each sample once, over all processes)

Each task's result is written as soon as it is there. The same command again goes on with the tasks that are not.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, without installation

import torch  # noqa: E402

from eval.errors import UserError, command  # noqa: E402
from eval.evaluators import RESAMPLES, SCORINGS, Share, evaluate_task  # noqa: E402
from eval.plots import score_bars  # noqa: E402
from eval.probes import PROBES  # noqa: E402
from eval.publish import publish  # noqa: E402
from eval.tasks import ROOT, Task, aggregate, known_tasks, select_tasks  # noqa: E402


SCHEMA_VERSION = 3


def evaluate(model, processor, task: Task, share: Share, sheet: Path | None = None) -> list[dict]:
    """A task's metrics while a model is trained: [{"task", "metric", "value" (a fraction), "num_samples"}, ...]."""
    entry = evaluate_task(model, processor, task, share=share, sheet=sheet, resamples=0)
    return [
        {"task": task.name, "metric": name, "value": metric["value"], "num_samples": entry["num_samples"]}
        for name, metric in entry["metrics"].items()
    ]


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


def load_model(name: str):
    """(model, processor) of a folder or repository; raises `UserError` when they cannot be loaded."""
    from transformers import AutoModel, AutoProcessor

    import modeling_amorlip  # noqa: F401  registers AmorLIP

    if name.startswith("open_clip:"):
        from eval.open_clip_models import load_open_clip

        return load_open_clip(name.removeprefix("open_clip:"))
    if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder.")
    try:
        return AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name} cannot be loaded: {reason}") from None


def run_tasks(model, processor, tasks: list[Task], report: dict, arguments: argparse.Namespace, share: Share) -> None:
    """Fills in the report task by task, and writes it after each."""
    for task in tasks:
        done = report["tasks"].get(task.name, {}).get("status")
        if done in ("complete", "partial"):
            if share.rank == 0:
                print(f"{task.name}: done before, taken over from {arguments.output}")
            continue
        try:
            entry = evaluate_task(
                model, processor, task, arguments.data_dir, arguments.batch_size, tuple(arguments.scoring), share,
                arguments.contact_sheet, arguments.bootstrap, tuple(arguments.probe),
            )  # fmt: skip
        except Exception as error:  # one task's trouble is not to cost the others
            # What the data lacks is missing; anything else failed. Every process comes to the same end.
            status = "missing" if isinstance(error, UserError) else "failed"
            entry = {
                "title": task.title, "status": status, "reason": f"{str(error).strip() or type(error).__name__}",
                "dataset": {"name": task.repositories[0] if task.repositories else task.data, "split": task.split},
                "num_samples": 0, "expected_samples": task.size, "main_metric": task.main_metric, "metrics": {},
                "scoring": {},
            }  # fmt: skip
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


def list_tasks() -> None:
    print(f"{'task':<48} {'groups':<34} {'main metric':<22} {'samples':>8} {'classes':>8} {'random %':>9}")
    for task in known_tasks().values():
        random = "" if task.random_score is None else f"{100 * task.random_score:.2f}"
        groups, classes = " ".join(task.groups), task.num_classes or ""
        print(f"{task.name:<48} {groups:<34} {task.main_metric:<22} {task.size:8d} {classes:>8} {random:>9}")


def download(tasks: list[Task], data_dir: Path) -> None:
    """Fetches tasks' repositories from the Hub; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for task in tasks:
        if not task.repositories:
            raise UserError(f"Task {task.name} has no repository to download: it reads {task.data}.")
        for repository in task.repositories:
            folder = data_dir / repository.split("/")[-1]
            try:
                snapshot_download(repository, repo_type="dataset", local_dir=folder)
            except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:  # of names that lead out
                reason = str(error).strip().splitlines()[0]
                print(f"{task.name}: {repository} cannot be had: {reason}", file=sys.stderr)
                continue
            print(f"{task.name}: {folder}")
            break
        else:
            raise UserError(f"Task {task.name}: none of {', '.join(task.repositories)} could be downloaded.")


def revision(name: str, model) -> str | None:
    """The commit of a model from the Hub; of a folder, the beginning of its weights' SHA-256."""
    if weights := sorted(Path(name).glob("model*.safetensors")):
        digest = hashlib.sha256()
        for file in weights:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]
    return getattr(model.config, "_commit_hash", None)


def _code_version() -> str:
    command = ["git", "rev-parse", "HEAD"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


@command
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
    share, device = Share(), "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        share, device = Share(state.process_index, state.num_processes), state.device
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
