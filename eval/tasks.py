"""Evaluation tasks as data, groups of them, and aggregates over them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from modeling_amorlip.cli_amorlip import UserError


ROOT = Path(__file__).resolve().parent.parent
RECALLS = ("mean_recall@1", *(f"{name}_retrieval_recall@{k}" for name in ("text", "image") for k in (1, 5, 10)))
METRICS = {
    "classification": ("acc1", "acc5", "mean_per_class_recall", "F1-macro_all")
    + ("acc_worst_region", "acc_wg", "acc_top5_wg"),
    "retrieval": RECALLS,
    "winogavil": ("jaccard_score", "jaccard_score_5-6", "jaccard_score_10-12"),
}
"""The kinds of tasks, with the metrics that a task of each may name as its main one; the first is the default."""


@dataclass(frozen=True)
class Task:
    """
    One data set and how it is scored. Its data is a folder in a public layout, or anything that `datasets` reads.

    Args:
        name: Key in tasks.yaml.
        title: Name shown in tables and cards.
        kind: One of `METRICS`.
        main_metric: Metric that aggregates, cards and plots take; one of `METRICS`, the first of the kind if empty.
        repositories: Data sets on the Hub with the same content; a folder with the name of one holds the data.
        data: Parquet file, folder or Hub name for `datasets`, relative to the data folder; replaces `repositories`.
        texts: JSON file with `classes` (one name per label) and `templates`; defaults to the label column's own names.
        split: Split that is evaluated.
        image_column: Column of `data` that holds the image.
        label_column: Column of `data` that holds the label: a ClassLabel, text or an integer.
        size: Number of samples (images or instances) in a complete copy.
        num_classes: Number of classes.
        random_score: Main metric of random guessing, as a fraction.
        groups: Names that select the task together with others.
        ignored_groups: Values of the metadata's first column that worst-group metrics leave out.
        class_retrieval: Report retrieval between images and class names as well.
        class_prior: Expected share of each class, for Sinkhorn scoring; uniform if empty.
        pixel_baseline: acc1 of the nearest training image in 16 x 16 pixels, as a fraction, shown for comparison.
    """

    name: str
    title: str = ""
    kind: str = "classification"
    main_metric: str = ""
    repositories: tuple[str, ...] = ()
    data: str | None = None
    texts: str | None = None
    split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    size: int | None = None
    num_classes: int | None = None
    random_score: float | None = None
    groups: tuple[str, ...] = ()
    ignored_groups: tuple[int, ...] = ()
    class_retrieval: bool = False
    class_prior: tuple[float, ...] = ()
    pixel_baseline: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise UserError(f"Task {self.name}: kind is {self.kind!r}; choose one of {', '.join(METRICS)}.")
        metrics = METRICS[self.kind] + (RECALLS if self.class_retrieval else ())
        if not self.main_metric:
            object.__setattr__(self, "main_metric", metrics[0])
        elif self.main_metric not in metrics:
            raise UserError(
                f"Task {self.name}: main_metric is {self.main_metric!r}; a {self.kind} task has {', '.join(metrics)}."
            )
        if bool(self.repositories) == bool(self.data):
            raise UserError(f"Task {self.name} needs either repositories or data.")

    @property
    def dataset(self) -> str:
        """Name of the data: the first repository, or `data`."""
        return self.repositories[0] if self.repositories else str(self.data)


LIST_FIELDS: dict[str, tuple[type, ...]] = {
    "repositories": (str,),
    "groups": (str,),
    "ignored_groups": (int,),
    "class_prior": (int, float),
}
"""Fields of a task that are lists, with the types of their items."""

SCALAR_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "kind", "main_metric", "data", "texts", "split", "image_column", "label_column"), (str,)),
    **dict.fromkeys(("size", "num_classes"), (int,)),
    **dict.fromkeys(("random_score", "pixel_baseline"), (int, float)),
    "class_retrieval": (bool,),
}
"""Fields of a task that are single values, with their types."""


AGGREGATES = {
    # As the AmorLIP paper reports them.
    "imagenet_and_shifts": ("imagenet", "imagenet_shifts"),
    "flickr_coco": ("flickr_coco",),
    "datacomp_38": ("datacomp",),
    # As DataComp reports them.
    "imagenet": ("imagenet",),
    "imagenet_shifts": ("imagenet_shifts",),
    "vtab_13": ("vtab",),
    "retrieval_3": ("retrieval",),
}
"""Means of main metrics, with the groups that each is taken over. `flickr_coco` is `retrieval` without WinoGAViL."""


@dataclass(frozen=True)
class Aggregate:
    """The mean of several tasks' main metrics; `value` is None unless all of them are complete."""

    value: float | None
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether no task is missing."""
        return not self.missing


def known_tasks() -> dict[str, Task]:
    """Return all tasks of tasks.yaml by name."""
    return _read_task_file(ROOT / "eval/tasks.yaml")


def load_task(name: str) -> Task:
    """Return the task of that name, which `select_tasks` explains; raise `UserError` for a group of several."""
    tasks = select_tasks([name])
    if len(tasks) != 1:
        raise UserError(f"{name} is a group of {len(tasks)} tasks; name one task.")
    return tasks[0]


def select_tasks(names: list[str]) -> list[Task]:
    """Return tasks by name, by group, or from YAML files of the same form, each once, in the order given.

    "FILE.yaml" selects all tasks of a file, "FILE.yaml:NAME" one of them.

    Raises:
        UserError: There is no such task, or a task file is wrong.
    """
    known = known_tasks()
    groups = sorted({group for task in known.values() for group in task.groups})
    chosen: dict[str, Task] = {}
    for name in names:
        file, _, member = name.rpartition(":")
        if _is_yaml(file) or _is_yaml(name):
            chosen |= _select_from_file(file, member) if _is_yaml(file) else _select_from_file(name, "")
        elif name in groups:
            chosen |= {key: task for key, task in known.items() if name in task.groups}
        elif name in known:
            chosen[name] = known[name]
        else:
            nearest = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see eval/run.py --list, or name a .yaml file."
            raise UserError(f"Unknown task {name}: {hint}")
    return list(chosen.values())


def _select_from_file(file: str, member: str) -> dict[str, Task]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"Task file {file} does not exist.")
    tasks = _read_task_file(path)
    if member and member not in tasks:
        raise UserError(f"Task file {file} has no task {member}; there are {', '.join(tasks)}.")
    return {member: tasks[member]} if member else tasks


def aggregate(values: dict[str, float | None]) -> dict[str, Aggregate]:
    """Return the aggregates that any of the given tasks is part of.

    Args:
        values: {task: main metric, or None where the task is not complete}.
    """
    aggregates, known = {}, known_tasks()
    for name, groups in AGGREGATES.items():
        if name == "flickr_coco":
            members = [k for k, task in known.items() if task.kind == "retrieval" and "datacomp" in task.groups]
        else:
            members = [key for key, task in known.items() if set(groups) & set(task.groups)]
        if not set(members) & set(values):
            continue
        present = [value for key in members if (value := values.get(key)) is not None]
        missing = tuple(key for key in members if values.get(key) is None)
        aggregates[name] = Aggregate(None if missing else sum(present) / len(members), missing)
    return aggregates


def _is_yaml(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _read_task_file(file: Path) -> dict[str, Task]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"Task file {file} must map the name of each task to a mapping of its fields.")
    return {str(name): _make_task(str(name), values) for name, values in content.items()}


def _make_task(name: str, values: dict[str, Any]) -> Task:
    """Return a task from the fields of a task file; raise `UserError` for an unknown field or a wrong type."""
    allowed = [field.name for field in fields(Task) if field.name != "name"]
    if unknown := sorted(map(str, set(values) - set(allowed))):
        nearest = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(allowed)}."
        raise UserError(f"Task {name} has the unknown field {unknown[0]}: {hint}")
    arguments: dict[str, Any] = {"title": name}
    for key, value in values.items():
        arguments[key] = _check_list(name, key, value) if key in LIST_FIELDS else _check_scalar(name, key, value)
    return Task(name, **arguments)


def _check_list(task: str, key: str, value: Any) -> tuple:
    if not isinstance(value, list):
        raise UserError(f"Task {task}: {key} is {value!r}, but must be a list; write {key}: [{value}].")
    types = LIST_FIELDS[key]
    for item in value:
        if not isinstance(item, types) or isinstance(item, bool):
            raise UserError(f"Task {task}: {key} has the item {item!r}; its items must be {_describe(types)}.")
    return tuple(value)


def _check_scalar(task: str, key: str, value: Any) -> Any:
    types = SCALAR_FIELDS[key]
    is_wrong_bool = isinstance(value, bool) and bool not in types
    if value is not None and (is_wrong_bool or not isinstance(value, types)):
        raise UserError(f"Task {task}: {key} is {value!r}, but must be {_describe(types)}.")
    return value


def _describe(types: tuple[type, ...]) -> str:
    return {str: "text", bool: "true or false", int: "an integer"}[types[0]] if len(types) == 1 else "a number"
