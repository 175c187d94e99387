"""What there is to evaluate on: tasks as data."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import yaml

from .errors import UserError


ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Task:
    """Labelled images with class names and prompt templates.

    Args:
        name: shown in results.
        data: parquet with `image` (datasets.Image) and `label` (datasets.ClassLabel).
        texts: JSON with `classes`, a name a label, and `templates` with `{}` for the name.
        pixel_reference: parquet with `image` and `caption` for the pixel-nearest-neighbour baseline, if any.
    """

    name: str
    data: str
    texts: str
    pixel_reference: str | None = None


def load_task(name: str) -> Task:
    """The task of that name in tasks.yaml, or the one that a YAML file of the same form describes.

    Raises:
        UserError: there is no such task, or its description has other fields.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise UserError(f"Task file {name} does not exist.")
        known = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        if not isinstance(known, dict) or len(known) != 1:
            raise UserError(f"Task file {name} must describe one task: a name, and its fields below it.")
        name = next(iter(known))
    else:
        known = yaml.safe_load((ROOT / "eval/tasks.yaml").read_text(encoding="utf-8"))
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(known)}, or name a .yaml file."
        raise UserError(f"Unknown task {name}: {hint}")
    allowed = [field.name for field in fields(Task) if field.name != "name"]
    values = known[name]
    if not isinstance(values, dict) or not {"data", "texts"} <= set(values) <= set(allowed):
        raise UserError(f"Task {name} needs the fields data and texts, and may have pixel_reference; got {values}.")
    return Task(name, **values)


def load_parquet(path: str, data_dir: Path) -> datasets.Dataset:
    """Rows of a parquet file below `data_dir`; raises `UserError` where there is none."""
    file = data_dir / path
    if not file.is_file():
        raise UserError(f"{file} does not exist: the task's data is missing; name its folder with --data_dir.")
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


def load_texts(path: str, data_dir: Path) -> tuple[list[str], list[str]]:
    """(class names, templates) of a task."""
    file = data_dir / path
    if not file.is_file():
        raise UserError(f"{file} does not exist: the class names are missing; name their folder with --data_dir.")
    texts = json.loads(file.read_text(encoding="utf-8"))
    return texts["classes"], texts["templates"]
