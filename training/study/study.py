"""Compare objectives over batch sizes and seeds, each tuned with the same budget, in one table and plots.

    python training/study/study.py --config training/study/study_demo.yaml --output_dir outputs/study_demo
    python training/study/study.py --config training/study/study.yaml --data_dir DATA --output_dir outputs/study \\
        --only tune
    python training/study/study.py --config training/study/study.yaml --data_dir DATA --output_dir outputs/study \\
        --only table

A study is one YAML file with the fields of `Study` in training/study/study_config.py. Each run is a process of
training/pretrain.py on one thread, with `jobs` runs at a time. Repeat the command to continue a study that was stopped:
finished runs are kept, and an unfinished run resumes from its checkpoint.

1. Tuning: every method tries the settings of its grid, equally many for all, at one batch size and seed. The setting
   with the highest mean over the `development` tasks is chosen.
2. Report: the chosen setting runs at all batch sizes and seeds, scored on the `report` tasks, which have no part in the
   choice.

Every run sees the same number of samples at every batch size. AdamW's learning rates scale with the square root of the
batch size (Malladi et al. 2022). `output_dir` receives runs/, table.md, results.csv, results.json and plots.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from eval.tasks import ROOT, Task, select_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from training.config import PretrainConfig
from training.study.study_config import Study, read_study
from training.study.study_results import (
    Results,
    Run,
    RunResult,
    draw_results,
    gains_table,
    results_json,
    results_table,
    write_csv,
)


SCALED_WITH_BATCH = ("learning_rate", "logit_scale_learning_rate")


class Harness:
    """The runs of a study in a folder: lists them, executes the missing ones and reports on the finished ones."""

    def __init__(self, study: Study, output_dir: Path, data_dir: Path) -> None:
        self.study, self.output_dir, self.data_dir = study, output_dir.resolve(), data_dir.resolve()
        own = {task.name: task for task in select_tasks([str(ROOT / study.tasks)])} if study.tasks else {}
        self.tasks = {
            name: self._with_absolute_paths(own[name] if name in own else select_tasks([name])[0])
            for name in (*study.development, *study.report)
        }
        self.processes: set[subprocess.Popen[bytes]] = set()

    def _with_absolute_paths(self, task: Task) -> Task:
        if not task.data:
            raise UserError(f"Task {task.name}: a study needs tasks whose data is a parquet file.")
        texts = str(self.data_dir / task.texts) if task.texts else None
        return dataclasses.replace(task, data=str(self.data_dir / task.data), texts=texts)

    def folder(self, run: Run) -> Path:
        """Return the output_dir of a run."""
        return self.output_dir / "runs" / run.name

    def result(self, run: Run) -> RunResult | None:
        """Return the result of a run, or None while it is not finished."""
        path = self.folder(run) / "result.json"
        return RunResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def results(self, runs: list[Run]) -> Results:
        """Return the results of those runs that are finished."""
        results = {run: self.result(run) for run in runs}
        return {run: result for run, result in results.items() if result is not None}

    # Runs

    def tuning_runs(self) -> list[Run]:
        """Return one run per setting, for methods with several settings."""
        study = self.study
        return [
            Run(method, setting, study.tuning_batch_size, study.tuning_seed)
            for method in study.methods
            for setting in range(len(study.settings(method)))
            if len(study.settings(method)) > 1
        ]

    def report_runs(self) -> list[Run]:
        """Return the runs of all tuned methods, ordered by seed so that an unfinished study compares all methods."""
        runs = [
            Run(method, setting, size, seed)
            for method in self.study.methods
            if (setting := self.best_setting(method)) is not None
            for size in self.study.batch_sizes_of(method)
            for seed in self.study.seeds_of(method)
        ]
        return sorted(runs, key=lambda run: (run.seed, run.batch_size))

    def best_setting(self, method: str) -> int | None:
        """Return the setting with the highest development score, or None while a tuning run is missing."""
        runs = [run for run in self.tuning_runs() if run.method == method]
        if not runs:
            return 0
        results = self.results(runs)
        if len(results) < len(runs):
            return None
        return max(runs, key=lambda run: results[run].score(self.study.development)).setting

    def recipe(self, run: Run) -> dict[str, Any]:
        """Return the complete recipe of a run."""
        study, method = self.study, self.study.methods[run.method]
        values = yaml.safe_load((ROOT / study.recipe).read_text(encoding="utf-8"))
        own = {name: getattr(method, name) for name in ("objective", "objective_args", "amortizer_config")}
        for name, value in {**study.overrides, **own, **study.settings(run.method)[run.setting]}.items():
            _set_dotted(values, name, copy.deepcopy(value))
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
            "eval_tasks": [str(self._write_task(task)) for task in self.tasks.values()] if study.evaluations else [],
            "eval_every": steps // (study.evaluations + 1) if study.evaluations else 0,
        }
        return values

    def _write_task(self, task: Task) -> Path:
        """Write a task with absolute paths as a YAML file, which training can evaluate."""
        path = self.output_dir / "tasks" / f"{task.name}.yaml"
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(task).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump({values.pop("name"): values}))
        return path

    # Execution

    def run_missing(self, runs: list[Run]) -> list[Run]:
        """Execute those runs that have no result, `jobs` at a time, and return the runs that failed."""
        missing = [run for run in dict.fromkeys(runs) if self.result(run) is None]
        print(f"{len(runs)} runs, {len(missing)} to do, {self.study.jobs} at a time", flush=True)
        with ThreadPoolExecutor(self.study.jobs) as pool:
            try:
                successes = list(pool.map(self._execute, missing))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()  # training then saves a checkpoint
                raise
        return [run for run, success in zip(missing, successes, strict=True) if not success]

    def _execute(self, run: Run) -> bool:
        """Train and measure one run; return whether it succeeded."""
        folder = self.folder(run)
        recipe_path, log = (folder.parent / f"{run.name}.{suffix}" for suffix in ("yaml", "log"))
        recipe = yaml.safe_dump(self.recipe(run), sort_keys=False)
        if folder.exists() and (not recipe_path.exists() or recipe_path.read_text(encoding="utf-8") != recipe):
            print(
                f"failed: {folder} holds a run with other settings; remove it or choose another --output_dir",
                flush=True,
            )
            return False
        folder.mkdir(parents=True, exist_ok=True)
        _write(recipe_path, recipe)
        if not self._train(recipe_path, folder, log):
            print(f"failed: {run.name}; see {log}", flush=True)
            return False
        _write(folder / "result.json", json.dumps(dataclasses.asdict(self._measure(folder)), indent=2) + "\n")
        for leftover in ("checkpoints", "best"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
        print(f"done:   {run.name}", flush=True)
        return True

    def _train(self, recipe: Path, folder: Path, log: Path) -> bool:
        """Start or resume training in a process of its own; return whether it reached the end."""
        command = [sys.executable, str(ROOT / "training/pretrain.py"), "--config", str(recipe)]
        if (folder / "run_config.yaml").exists():
            command += ["--resume_from_checkpoint", "latest"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)
            self.processes.add(process)
            try:
                return process.wait() == 0
            finally:
                self.processes.discard(process)

    def _measure(self, folder: Path) -> RunResult:
        from training.study.study_measure import measure  # imports torch, which tables do not need

        study = self.study
        return measure(folder, list(self.tasks.values()), study.report, study.tuning_batch_size, study.partition_pairs)

    # Results

    def write_report(self) -> str:
        """Write the table, raw results and plots of the finished runs, and return the table."""
        study, report = self.study, self.results(self.report_runs())
        if not report:
            return "No run of the report is finished."
        table = results_table(report, study.development, study.report, study.baseline)
        if study.subject:
            table += "\n\n" + gains_table(report, study.subject, study.report)
        _write(self.output_dir / "table.md", table + "\n")
        best = {method: self.best_setting(method) for method in study.methods}
        chosen = {method: study.settings(method)[setting] for method, setting in best.items() if setting is not None}
        tuning = self.results(self.tuning_runs())
        _write(self.output_dir / "results.json", results_json(chosen, tuning, report))
        write_csv(self.output_dir / "results.csv", tuning, report)
        draw_results(report, {run: self.folder(run) for run in report}, study.report, self.output_dir)
        return table


def _set_dotted(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a member of nested mappings by its dotted name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[leaf] = value


def _write(path: Path, text: str) -> None:
    """Replace a file atomically. The name of the temporary file holds the thread, since runs write the same tasks."""
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for runs, table and plots")
    parser.add_argument("--data_dir", type=Path, default=ROOT, help="folder that data paths start from (the checkout)")
    parser.add_argument("--jobs", type=int, help="concurrent runs (default: the study's)")
    parser.add_argument("--only", choices=("tune", "report", "table"), help="only this part (default: all parts)")
    return parser.parse_args()


@cli_entry_point
def main() -> int:
    """Execute the missing runs of a study and print its table."""
    arguments = parse_arguments()
    study = read_study(arguments.config)
    study.jobs = arguments.jobs or study.jobs
    harness = Harness(study, arguments.output_dir, arguments.data_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []
    if arguments.only in (None, "tune"):
        failed += harness.run_missing(harness.tuning_runs())
    if arguments.only in (None, "report"):
        failed += harness.run_missing(harness.report_runs())
    print(harness.write_report())
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
