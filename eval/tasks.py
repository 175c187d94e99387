"""What there is to evaluate on: tasks as data, groups of them, and aggregates over them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from modeling_amorlip.cli_amorlip import UserError


ROOT = Path(__file__).resolve().parent.parent
KINDS = ("classification", "retrieval", "winogavil")


@dataclass(frozen=True)
class Task:
    """
    One data set and how it is scored. Its data is a folder of the public layouts, or what `datasets` reads.

    Args:
        name: as in tasks.yaml. title: shown in tables. kind: one of `KINDS`.
        main_metric: the one that aggregates take.
        repositories: data-set repositories of the Hub with the same content; a folder of such a name holds the data.
        data: instead, a parquet file, a folder or a Hub name for `datasets`, with an image and a label column.
        texts: JSON with `classes`, a name a label, and `templates`; without it, the label column's own names are taken.
        split, image_column, label_column: of `data`.
        size: number of samples (instances, images) that a complete copy has. num_classes: likewise.
        random_score: main metric of random guessing. groups: names that select the task together with others.
        ignored_groups: values of the metadata's first column that worst-group metrics leave out.
        pixel_reference: parquet with `image` and `caption` for the pixel-nearest-neighbour baseline.
    """

    name: str
    title: str = ""
    kind: str = "classification"
    main_metric: str = "acc1"
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
    pixel_reference: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"Task {self.name}: kind is {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if bool(self.repositories) == bool(self.data):
            raise UserError(f"Task {self.name} needs either repositories or data.")


AGGREGATES = {
    # as the AmorLIP paper reports them
    "imagenet_and_shifts": ("imagenet", "imagenet_shifts"),
    "flickr_coco": ("flickr_coco",),
    "datacomp_38": ("datacomp",),
    # as DataComp does
    "imagenet": ("imagenet",),
    "imagenet_shifts": ("imagenet_shifts",),
    "vtab_13": ("vtab",),
    "retrieval_3": ("retrieval",),
}
"""Means of main metrics, and the groups that they are over. `flickr_coco` is `retrieval` without WinoGAViL."""


def known_tasks() -> dict[str, Task]:
    """All tasks of tasks.yaml by name."""
    return _read(ROOT / "eval/tasks.yaml")


def load_task(name: str) -> Task:
    """The task of that name; raises `UserError` for a group, or where there is none."""
    tasks = select_tasks([name])
    if len(tasks) != 1:
        raise UserError(f"{name} is a group of {len(tasks)} tasks; name one task.")
    return tasks[0]


def select_tasks(names: list[str]) -> list[Task]:
    """Tasks by name, by group, or from YAML files of the same form, each once, in the order given.

    "FILE.yaml" are all tasks of a file, "FILE.yaml:NAME" is one of them.

    Raises:
        UserError: there is no such task, or a description has wrong fields.
    """
    known, chosen = known_tasks(), {}
    groups = sorted({group for task in known.values() for group in task.groups})
    for name in names:
        file, _, one = name.rpartition(":")
        if not _is_yaml(file):
            file, one = name, ""
        if _is_yaml(file):
            if not Path(file).is_file():
                raise UserError(f"Task file {file} does not exist.")
            found = _read(Path(file))
            if one and one not in found:
                raise UserError(f"Task file {file} has no task {one}; there are {', '.join(found)}.")
            chosen |= {one: found[one]} if one else found
        elif name in groups:
            chosen |= {key: task for key, task in known.items() if name in task.groups}
        elif name in known:
            chosen[name] = known[name]
        else:
            nearest = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --list, or name a .yaml file."
            raise UserError(f"Unknown task {name}: {hint}")
    return list(chosen.values())


def aggregate(values: dict[str, float | None]) -> dict[str, dict]:
    """Aggregates over {task: main metric, or None where it is not complete}, those that any of the tasks is part of.

    Returns:
        {aggregate: {"value": the mean, or None unless every task is there, "complete", "missing": names of tasks}}.
    """
    aggregates, known = {}, known_tasks()
    for name, groups in AGGREGATES.items():
        if name == "flickr_coco":
            members = [k for k, task in known.items() if task.kind == "retrieval" and "datacomp" in task.groups]
        else:
            members = [key for key, task in known.items() if set(groups) & set(task.groups)]
        if not set(members) & set(values):
            continue
        missing = [key for key in members if values.get(key) is None]
        mean = None if missing else sum(values[key] for key in members) / len(members)
        aggregates[name] = {"value": mean, "complete": not missing, "missing": missing}
    return aggregates


def _is_yaml(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _read(file: Path) -> dict[str, Task]:
    try:
        described = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    if not isinstance(described, dict) or not all(isinstance(values, dict) for values in described.values()):
        raise UserError(f"Task file {file} must hold names of tasks, each with its fields below it.")
    allowed = [field.name for field in fields(Task) if field.name != "name"]
    tasks = {}
    for name, values in described.items():
        if unknown := sorted(set(values) - set(allowed)):
            nearest = difflib.get_close_matches(unknown[0], allowed, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(allowed)}."
            raise UserError(f"Task {name} has the unknown field {unknown[0]}: {hint}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        tasks[name] = Task(name, **{"title": name, **values})
    return tasks
