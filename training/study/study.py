"""Compares objectives: methods x batch sizes x seeds, tuned with the same budget each, into one table and plots.

    python training/study/study.py --config training/study/study_demo.yaml --output_dir outputs/study
    python training/study/study.py --config training/study/study.yaml --data_dir DATA --output_dir outputs/study \\
        --only tune
    python training/study/study.py ... --only table     # of what is there so far

A study is one YAML, the fields of `Study`. Each run is a process of training/pretrain.py on one thread, `jobs` of them
at a time. The same command again goes on where it stopped: runs that are done stay, one that was cut off resumes.

1. Tuning: every method's grid, all of the same size, at one batch size and seed. The setting whose mean score over the
   `development` tasks is highest is the method's.
2. Report: that setting over all batch sizes and seeds, scored on the `report` tasks, which had no part in the choice.

Every run sees the same number of samples, whatever its batch size; AdamW's learning rates follow the square root of the
batch size (Malladi et al. 2022). `output_dir` gets runs/, table.md, results.csv, results.json and plots.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from eval.tasks import ROOT, Task, select_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from training.config import PretrainConfig, build, unknown_name
from training.study.study_results import draw_results, gains_table, measure, results_table, score


SCALED_WITH_BATCH = ("learning_rate", "logit_scale_learning_rate")


@dataclass
class Method:
    """A row of the table; `grid` lists values of further fields to tune, beside the study's own grid."""

    objective: str
    objective_args: dict = field(default_factory=dict)
    amortizer_config: dict = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)  # else the study's


@dataclass
class Study:
    """What is compared, on what, how often. Fields of recipes are named as on training's command line."""

    recipe: str  # what all runs have in common
    samples_per_epoch: int  # a multiple of every batch size, near the size of the training set
    methods: dict[str, Method]
    development: list[str]  # tasks that settings are chosen on
    report: list[str]  # tasks that the table is about
    overrides: dict = field(default_factory=dict)  # of the recipe
    tasks: str | None = None  # YAML of tasks beside those of eval/tasks.yaml, whose paths start from --data_dir
    baseline: str = "clip"  # method that differences are to
    subject: str | None = None  # method whose gains over every other one are a table of their own
    batch_sizes: list[int] = field(default_factory=lambda: [64])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    grid: dict[str, list] = field(default_factory=dict)  # values to tune, for every method
    tuning_batch_size: int = 64
    tuning_seed: int = 0
    warmup_samples: int = 0
    evaluations: int = 0  # during a run, for the curve of accuracy
    jobs: int = 2  # runs at a time

    def __post_init__(self):
        self.methods = {name: build(Method, values, f"methods.{name}.") for name, values in self.methods.items()}
        for name in ("baseline", "subject"):
            if (value := getattr(self, name)) is not None and value not in self.methods:
                raise UserError(unknown_name(name, value, list(self.methods)))
        budgets = {name: len(self.settings(name)) for name in self.methods}
        if len(set(budgets.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in budgets.items())
            raise UserError(f"Every method must be tuned with the same budget; settings in their grids: {sizes}.")
        for size in {self.tuning_batch_size, *itertools.chain(*map(self.sizes, self.methods))}:
            if self.samples_per_epoch % size:
                raise UserError(f"samples_per_epoch {self.samples_per_epoch} is no multiple of the batch size {size}.")

    def sizes(self, method: str) -> list[int]:
        return self.methods[method].batch_sizes or self.batch_sizes

    def settings(self, method: str) -> list[dict[str, Any]]:
        """A method's grid, spelled out: its own values take the place of the study's of the same name."""
        grid = self.grid | self.methods[method].grid
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


class Run(NamedTuple):
    method: str
    setting: int  # which of the method's grid
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-setting{self.setting}-batch{self.batch_size}-seed{self.seed}"


class Harness:
    """Runs of a study in a folder: what is to be done, what is there."""

    def __init__(self, study: Study, output_dir: Path, data_dir: Path):
        self.study, self.output_dir, self.data_dir = study, output_dir.resolve(), data_dir.resolve()
        known = {task.name: task for task in select_tasks([study.tasks])} if study.tasks else {}
        self.tasks = {
            name: self._at_home(known[name] if name in known else select_tasks([name])[0])
            for name in (*study.development, *study.report)
        }
        self.processes: set[subprocess.Popen] = set()

    def _at_home(self, task: Task) -> Task:
        """The task with paths that do not depend on where it is read."""
        if not task.data:
            raise UserError(f"Task {task.name}: a study's tasks need a parquet file as data.")
        paths = {name: str(self.data_dir / getattr(task, name)) for name in ("data", "texts") if getattr(task, name)}
        return dataclasses.replace(task, **paths, pixel_reference=None)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def tuning_runs(self) -> list[Run]:
        study = self.study
        return [
            Run(method, setting, study.tuning_batch_size, study.tuning_seed)
            for method in study.methods
            for setting in range(len(study.settings(method)))
            if len(study.settings(method)) > 1
        ]

    def report_runs(self) -> list[Run]:
        """Seed by seed, so that a study that is cut short has compared all methods."""
        sizes = sorted({size for method in self.study.methods for size in self.study.sizes(method)})
        chosen = {method: self.choose(method) for method in self.study.methods}
        return [
            Run(method, chosen[method], size, seed)
            for seed in self.study.seeds
            for size in sizes
            for method in self.study.methods
            if size in self.study.sizes(method) and chosen[method] is not None
        ]

    def choose(self, method: str) -> int | None:
        """The setting that tuning found best; None as long as a tuning run is missing."""
        runs = [run for run in self.tuning_runs() if run.method == method]
        results = [self.result(run) for run in runs]
        if not runs:
            return 0
        if None in results:
            return None
        return runs[max(range(len(runs)), key=lambda i: score(results[i], self.study.development))].setting

    def recipe(self, run: Run) -> dict:
        """The complete recipe of a run."""
        study, method = self.study, self.study.methods[run.method]
        values = yaml.safe_load((ROOT / study.recipe).read_text(encoding="utf-8"))
        setting = study.settings(run.method)[run.setting]
        own = {name: getattr(method, name) for name in ("objective", "objective_args", "amortizer_config")}
        for name, value in {**study.overrides, **own, **setting}.items():
            *parents, leaf = name.split(".")
            target = values
            for parent in parents:
                target = target.setdefault(parent, {})
            target[leaf] = copy.deepcopy(value)
        for name in SCALED_WITH_BATCH:
            rate = float(values.get(name, getattr(PretrainConfig, name)))
            values[name] = rate * math.sqrt(run.batch_size / study.tuning_batch_size)
        steps = int(values["num_train_epochs"]) * study.samples_per_epoch // run.batch_size
        values |= {
            "output_dir": str(self.folder(run)),
            "train_data": str(self.data_dir / values["train_data"]),
            "samples_per_epoch": study.samples_per_epoch,
            "per_device_train_batch_size": run.batch_size,
            "warmup_steps": study.warmup_samples // run.batch_size,
            "seed": run.seed,
            "eval_tasks": [str(self._task_file(task)) for task in self.tasks.values()] if study.evaluations else [],
            "eval_every": steps // (study.evaluations + 1) if study.evaluations else 0,
        }
        return values

    def folder(self, run: Run) -> Path:
        return self.output_dir / "runs" / run.name

    def _task_file(self, task: Task) -> Path:
        path = self.output_dir / "tasks" / f"{task.name}.yaml"
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(task).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump({values.pop("name"): values}))
        return path

    def do(self, runs: list[Run]) -> list[Run]:
        """Does what is not done of these runs, `jobs` at a time; returns those that failed."""
        left = [run for run in dict.fromkeys(runs) if self.result(run) is None]
        print(f"{len(runs)} runs, {len(left)} of them to do, {self.study.jobs} at a time", flush=True)
        with ThreadPoolExecutor(self.study.jobs) as pool:
            try:
                done = list(pool.map(self._do_one, left))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()  # it saves a checkpoint
                raise
        return [run for run, successful in zip(left, done, strict=True) if not successful]

    def _do_one(self, run: Run) -> bool:
        folder = self.folder(run)
        recipe, log = (folder.parent / f"{run.name}.{kind}" for kind in ("yaml", "log"))
        wanted = yaml.safe_dump(self.recipe(run), sort_keys=False)
        if folder.exists() and (not recipe.exists() or recipe.read_text(encoding="utf-8") != wanted):
            print(f"failed: {folder} was made with other settings; remove it, or name another --output_dir", flush=True)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        _write(recipe, wanted)
        train = [sys.executable, str(ROOT / "training/pretrain.py"), "--config", str(recipe)]
        if (folder / "run_config.yaml").exists():
            train += ["--resume_from_checkpoint", "latest"]
        if not self._call(train, log):
            print(f"failed: {run.name}; see {log}", flush=True)
            return False
        tasks = list(self.tasks.values())
        result = measure(folder, tasks, self.study.report, self.study.tuning_batch_size)
        _write(folder / "result.json", json.dumps(result, indent=2) + "\n")
        for leftover in ("checkpoints", "best"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
        print(f"done:   {run.name}", flush=True)
        return True

    def _call(self, command: list[str], log: Path) -> bool:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)
            self.processes.add(process)
            try:
                return process.wait() == 0
            finally:
                self.processes.discard(process)

    # -- results -------------------------------------------------------------------------------------------------------

    def result(self, run: Run) -> dict | None:
        path = self.folder(run) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def report(self) -> str:
        """Writes table, raw results and plots of the runs that are done; returns the table."""
        study = self.study
        runs = [run for run in self.report_runs() if self.result(run) is not None]
        if not runs:
            return "No run of the report is done yet."
        results = {(run.method, run.batch_size, run.seed): self.result(run) for run in runs}
        table = results_table(results, study.development, study.report, study.baseline)
        if study.subject:
            table += "\n\n" + gains_table(results, study.subject, study.report)
        settings = {m: study.settings(m)[k] for m in study.methods if (k := self.choose(m)) is not None}
        _write(self.output_dir / "table.md", table + "\n")
        tuned = [run for run in self.tuning_runs() if self.result(run) is not None]
        phases = f'"tuning": [\n{self._rows(tuned)}\n],\n"report": [\n{self._rows(runs)}\n]'
        _write(self.output_dir / "results.json", f'{{"chosen": {json.dumps(settings)},\n{phases}}}\n')
        with (self.output_dir / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", *Run._fields, "task", "scoring", "value"])
            for phase, some in (("tuning", tuned), ("report", runs)):
                for run in some:
                    for task, values in self.result(run)["tasks"].items():
                        writer.writerows([phase, *run, task, scoring, value] for scoring, value in values.items())
        draw_results({run: (self.folder(run), self.result(run)) for run in runs}, study.report, self.output_dir)
        return table

    def _rows(self, runs: list[Run]) -> str:
        """JSON, a line a run."""
        return ",\n".join(json.dumps(run._asdict() | self.result(run)) for run in runs)


def _write(path: Path, text: str) -> None:
    """Whole or as it was."""
    aside = path.with_name(f".{path.name}.{threading.get_ident()}")  # runs beside each other write the same tasks
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_study(path: Path) -> Study:
    """Raises `UserError` on whatever is wrong with the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return build(Study, values)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path} is not a study: {error}") from None


@cli_entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the study")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for runs, table and plots")
    parser.add_argument("--data_dir", type=Path, default=ROOT, help="folder that paths of data start from")
    parser.add_argument("--jobs", type=int, help="runs at a time, else the study's")
    parser.add_argument("--only", choices=("tune", "report", "table"), help="do this part only")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []
    study = read_study(arguments.config)
    study.jobs = arguments.jobs or study.jobs
    harness = Harness(study, arguments.output_dir, arguments.data_dir)
    if arguments.only in (None, "tune"):
        failed += harness.do(harness.tuning_runs())
    if arguments.only in (None, "report"):
        failed += harness.do(harness.report_runs())
    print(harness.report())
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
