"""The results of an evaluation: one schema for results.json, eval.jsonl, cards and comparisons."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from eval.models import ModelRecord
from eval.plots import score_bars
from eval.scoring import scoring_name
from eval.tasks import Aggregate, aggregate, known_tasks
from modeling_amorlip.cli_amorlip import UserError


SCHEMA_VERSION = 4
OLDEST_SCHEMA_VERSION = 3
EVALUATED = ("complete", "partial")


@dataclass
class Metric:
    """A fraction and its 95 % confidence interval, if it has one."""

    value: float
    ci95: list[float] | None = None


@dataclass
class TaskResult:
    """What one task's evaluation came to.

    Args:
        task: Name in tasks.yaml or in a task file.
        title: Name shown in tables and cards.
        dataset: Repository on the Hub, file or folder that the task names.
        hub_dataset: Data set on the Hub that the data is a copy of; None for local data.
        split: Split that was evaluated.
        status: "complete", "partial" (samples are missing), "missing" (the data is) or "failed".
        main_metric: Name of the metric that aggregates take.
        num_samples: Number of samples that were scored.
        expected_samples: Number of samples in a complete copy, if known.
        reason: Why the status is not "complete".
        scores: {scoring: {metric: value}}; "cosine" comes first and has every metric.
        modes: {scoring: "inductive" or "transductive"}; the latter uses all queries to score each of them.
        unreadable: Keys of samples that could not be read, with the reason.
        random_score: Main metric of random guessing.
        pixel_baseline: acc1 of the nearest training image in 16 x 16 pixels.
        identity: Hashes of all that the result depends on; empty where they are not known.
    """

    task: str
    title: str
    dataset: str
    split: str
    status: str
    main_metric: str
    num_samples: int = 0
    expected_samples: int | None = None
    reason: str | None = None
    hub_dataset: str | None = None
    scores: dict[str, dict[str, Metric]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    random_score: float | None = None
    pixel_baseline: float | None = None
    identity: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Metric]:
        """All metrics by cosine."""
        return self.scores.get("cosine", {})

    @property
    def value(self) -> float:
        """The main metric by cosine."""
        return self.metrics[self.main_metric].value

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskResult:
        """Return the result that `to_dict` gave; raise KeyError or TypeError for anything else."""
        scores = {
            scoring: {name: Metric(float(metric["value"]), metric["ci95"]) for name, metric in metrics.items()}
            for scoring, metrics in values["scores"].items()
        }
        return cls(**{**values, "scores": scores})


@dataclass
class Report:
    """The results of one model, task by task.

    Args:
        model: What identifies the model.
        scorings: Ways of scoring that were asked for.
        code_version: Git revision of the evaluation's code.
        created: Time of the evaluation's start, ISO 8601.
        tasks: Results by task.
    """

    model: ModelRecord
    scorings: list[str] = field(default_factory=list)
    code_version: str = "unknown"
    created: str = ""
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    @property
    def aggregates(self) -> dict[str, Aggregate]:
        """Means over groups of tasks, for the groups that any of the tasks belongs to."""
        complete = {name: r.value if r.status == "complete" else None for name, r in self.tasks.items()}
        return aggregate(complete)

    def to_json(self) -> str:
        """Return the report as text for results.json."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "model": asdict(self.model),
            "scorings": self.scorings,
            "code_version": self.code_version,
            "created": self.created,
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
            "aggregates": {name: {**asdict(v), "complete": v.complete} for name, v in self.aggregates.items()},
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report of a results.json; raise ValueError for anything else, and for other schemas."""
        try:
            content = json.loads(text)
            version = content["schema_version"]
            if version == OLDEST_SCHEMA_VERSION:
                return _from_schema_3(content)
            if version != SCHEMA_VERSION:
                raise ValueError(f"its schema_version is {version}, this code reads 3 and {SCHEMA_VERSION}")
            tasks = {name: TaskResult.from_dict(values) for name, values in content["tasks"].items()}
            names = [f.name for f in fields(cls) if f.name not in ("model", "tasks")]
            return cls(ModelRecord(**content["model"]), **{name: content[name] for name in names}, tasks=tasks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks what results hold: {error!r}") from None

    def write(self, path: Path, plot: bool = True) -> None:
        """Write the report as JSON, and beside it its metrics as CSV and a plot; each appears whole or not at all.

        Args:
            path: JSON file; the others have its name.
            plot: Whether to draw the plot, which takes longer than the rest.

        Raises:
            UserError: The folder cannot be written to.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.writing")
            aside.write_text(self.to_json(), encoding="utf-8")
            os.replace(aside, path)
            self._write_csv(aside)
            os.replace(aside, path.with_suffix(".csv"))
            bars = [
                (result.title, result.value, result.metrics[result.main_metric].ci95, result.random_score)
                for result in self.tasks.values()
                if result.status in EVALUATED
            ]
            if bars and plot:
                score_bars(bars, aside.with_suffix(".png"))
                os.replace(aside.with_suffix(".png"), path.with_suffix(".png"))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None

    def _write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["task", "status", "scoring", "metric", "value", "ci95_low", "ci95_high", "num_samples"])
            for name, result in self.tasks.items():
                for scoring, metrics in result.scores.items():
                    for metric, score in metrics.items():
                        interval: list = score.ci95 or ["", ""]
                        row = [name, result.status, scoring, metric, score.value, *interval, result.num_samples]
                        writer.writerow(row)


def _from_schema_3(content: dict[str, Any]) -> Report:
    """Return a report that was written before there were identities, so that nothing is taken over from it."""
    tasks, known = {}, known_tasks()
    for name, values in content["tasks"].items():
        is_on_hub = name in known and bool(known[name].repositories)
        others = {scoring_name(scoring): metrics for scoring, metrics in values["scoring"].items()}
        scores = {"cosine": values["metrics"], **others}
        tasks[name] = TaskResult.from_dict(
            {
                "task": name,
                "dataset": values["dataset"]["name"],
                "split": values["dataset"]["split"],
                "hub_dataset": values["dataset"]["name"] if is_on_hub else None,
                "scores": scores if values["metrics"] else {},
                **{key: values[key] for key in ("title", "status", "reason", "num_samples")},
                **{key: values[key] for key in ("expected_samples", "main_metric")},
            }
        )
    return Report(
        ModelRecord(**content["model"]), content["scoring"], content["code_version"], content["created"], tasks
    )


def read_report(path: Path) -> Report:
    """Return the report of a results.json; raise `UserError` for anything else."""
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not what eval/run.py writes: {error}.") from None


def check_writable(option: str, path: Path) -> None:
    """Raise `UserError` when a file cannot be written; its folder is created, the file is not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{option} {path} cannot be written: {reason}; name another file.") from None


@dataclass
class Evaluation:
    """One line of a training run's eval.jsonl."""

    step: int
    results: list[TaskResult]
    validation_loss: float | None = None


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the lines of a training run's eval.jsonl; raise `UserError` for anything else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            Evaluation(line["step"], _results_of_line(line["results"]), line.get("validation_loss")) for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what training writes: {error!r}.") from None


def _results_of_line(results: list[dict[str, Any]]) -> list[TaskResult]:
    """Return the results of a line, also of one that was written before lines held whole results."""
    if all("scores" in values for values in results):
        return [TaskResult.from_dict(values) for values in results]
    known = known_tasks()
    by_task: dict[str, TaskResult] = {}
    for values in results:
        name = values["task"]
        task = known.get(name)
        main_metric = task.main_metric if task else values["metric"]
        title, dataset = (task.title, task.dataset) if task else (name, name)
        hub_dataset = dataset if task and task.repositories else None
        new = TaskResult(name, title, dataset, "test", "complete", main_metric, values["num_samples"])
        new.hub_dataset = hub_dataset
        by_task.setdefault(name, new).scores.setdefault("cosine", {})[values["metric"]] = Metric(values["value"])
    return list(by_task.values())


def read_run_config(folder: Path, load: Callable[[str], Any] = yaml.safe_load) -> dict[str, Any]:
    """Return the settings of a training run and under `versions` what it ran with, {} without a run_config.yaml.

    Args:
        load: Reader of YAML.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    file = folder / "run_config.yaml"
    if not file.is_file():
        return {}
    try:
        document = load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{file} is damaged: it is not YAML with one setting per line.")
    versions = document.get("versions", {})
    return document.get("arguments", document) | {"versions": versions}


def print_table(results: Iterable[TaskResult]) -> None:
    """Print every metric of some results, in per cent."""
    print(f"{'task':<20} {'metric':<28} {'value %':>8} {'samples':>8}")
    for result in results:
        for name, metric in result.metrics.items():
            print(f"{result.task:<20} {name:<28} {100 * metric.value:8.2f} {result.num_samples:8d}")
        if result.pixel_baseline is not None:
            print(f"{result.task:<20} {'(nearest pixels, acc1)':<28} {100 * result.pixel_baseline:8.2f}")


def print_report(report: Report) -> None:
    """Print tasks with their main metrics by each way of scoring, and aggregates, in per cent."""
    extra = [name for name in report.scorings if name != "cosine"]
    heading = f"{'task':<48} {'metric':<24} {'cosine':>7} {'95 % interval':>15}"
    print(heading + "".join(f" {name:>9}" for name in extra) + "  samples")
    for name, result in report.tasks.items():
        start = f"{name:<48} {result.main_metric:<24}"
        if result.status not in EVALUATED:
            print(f"{start} {result.status}: {result.reason}")
            continue
        ci95 = result.metrics[result.main_metric].ci95
        interval = f"{100 * ci95[0]:.2f} - {100 * ci95[1]:.2f}" if ci95 else ""
        others = [result.scores.get(scoring, {}).get(result.main_metric) for scoring in extra]
        columns = "".join(f" {'':>9}" if other is None else f" {100 * other.value:9.2f}" for other in others)
        notes = [result.reason] if result.reason else []
        if result.pixel_baseline is not None:
            notes.append(f"nearest pixels: {100 * result.pixel_baseline:.2f}")
        note = f"  ({'; '.join(notes)})" if notes else ""
        print(f"{start} {100 * result.value:7.2f} {interval:>15}{columns} {result.num_samples:8d}{note}")
    for name, mean in report.aggregates.items():
        missing = f"incomplete: {len(mean.missing)} tasks are missing, partial or failed"
        print(f"{name:<73} " + (missing if mean.value is None else f"{100 * mean.value:7.2f}"))
