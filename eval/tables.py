"""Tables of a task: which parquet files belong to a split, how labels become class numbers, and rows as samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError


SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names under which files of a split go, as in `datasets`."""


LABEL_TYPES = ("string", "large_string", "int", "uint", "bool")


def select_split(files: list[str], split: str, task: Task) -> list[str]:
    """Return the files that belong to a split, judged by their names and folders.

    Files that name no split at all are the split that the task is evaluated on, and no other.

    Args:
        files: Paths relative to the data's folder.

    Raises:
        UserError: None of the files belongs to the split.
    """
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, split), []).append(file)
    if chosen := by_split.get(split) or by_split.get(_canonical(split)):
        return chosen
    if set(by_split) == {""} and split == task.split:
        return files
    splits = ", ".join(sorted(filter(None, by_split))) or "one split without a name"
    raise UserError(f"{task.name}: there is no {split} split among its parquet files, which hold {splits}.")


def _canonical(split: str) -> str:
    return next((name for name, aliases in SPLIT_ALIASES.items() if split in aliases), split)


def _split_of(file: str, requested: str) -> str:
    """Return the split that a path names, "" if none; the file's own name counts before its folders'."""
    for part in reversed(file.lower().split("/")):
        for split, aliases in {requested: (requested,), **SPLIT_ALIASES}.items():
            if any(re.search(rf"(?<![a-z0-9]){re.escape(alias)}(?![a-z])", part) for alias in aliases):
                return split
    return ""


def load_parquet(files: Iterable[str], task: Task) -> datasets.Dataset:
    """Return the rows of parquet files; raise `UserError` when they cannot be read."""
    files = list(files)
    if not (files_with_rows := leave_out_empty(files)):
        raise UserError(f"{task.name}: {', '.join(files)} has no rows; fetch or write it again.")
    try:
        return datasets.load_dataset("parquet", data_files=files_with_rows, split="train")
    except Exception as error:  # `datasets` raises many types and hides the cause behind its own
        cause = error.__cause__ or error
        raise UserError(
            f"{task.name}: its parquet files cannot be read: {str(cause).strip().splitlines()[0]}"
        ) from None


def leave_out_empty(files: Iterable[str]) -> list[str]:
    """Return the parquet files that have rows, or cannot be read; `datasets` fails on those without rows."""

    def is_empty(file: str) -> bool:
        try:
            return pq.read_metadata(file).num_rows == 0
        except (OSError, pa.ArrowException):  # `datasets` says why
            return False

    return [file for file in files if not is_empty(file)]


def image_source(value: Any, where: str) -> bytes | str:
    """Return an image's bytes or its path, from the raw value of an image column."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)):
        raise UserError(f"{where}: its image is {type(value).__name__}, not the bytes or the path of an image file.")
    return value


def label_values(rows: datasets.Dataset, task: Task) -> tuple[list[str], dict[Any, int] | None]:
    """Return a label column's class names, and {label: class number} unless labels are class numbers.

    A ClassLabel column knows its names. The names of other columns are their values, sorted.

    Raises:
        UserError: Labels are neither text nor integers, or some are missing.
    """
    feature = rows.features[task.label_column]
    if isinstance(feature, datasets.ClassLabel):
        return [re.sub("[_-]", " ", name) for name in feature.names], None
    is_text_or_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(LABEL_TYPES)
    values = rows.unique(task.label_column) if is_text_or_integer else []
    if not values or None in values:
        raise UserError(
            f"{task.name}: the label column {task.label_column} is {feature}; labels must be text, integers or a "
            "ClassLabel, and none may be missing."
        )
    values = sorted(values)
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def check_templates(templates: Any, source: str) -> list[str]:
    """Return templates that each hold exactly one {c} or {}; raise `UserError` for any others."""
    for template in check_strings(templates, f"{source}: templates"):
        placeholders = re.findall(r"\{[^{}]*\}|%s", template)
        if len(placeholders) != 1 or placeholders[0] not in ("{c}", "{}"):
            raise UserError(
                f"{source}: the template {template!r} must hold exactly one placeholder; "
                "write {c} where the class name goes."
            )
    return list(templates)


def fill_template(template: str, name: str) -> str:
    """Return a template that `check_templates` passed with a class name, which may hold braces itself."""
    return template.replace("{c}" if "{c}" in template else "{}", name)


def check_classes(classes: Any, source: str) -> list[str]:
    """Return class names of which none is blank; raise `UserError` for any others, as labels count all of them."""
    names = check_strings(classes, source)
    if blank := [place for place, name in enumerate(names) if not name.strip()]:
        raise UserError(f"{source}: the name of class {blank[0]} is blank; write a name for each class.")
    return names


def number_classes(classes: list[str], source: str) -> dict[Any, int]:
    """Return {class name: class number}; raise `UserError` when two classes have one name."""
    numbers = {name: number for number, name in enumerate(classes)}
    if len(numbers) < len(classes):
        twice = next(name for number, name in enumerate(classes) if numbers[name] != number)
        raise UserError(f"{source}: two classes are called {twice!r}, so labels do not tell them apart; rename one.")
    return numbers


def read_text(file: Path) -> str:
    """Return the content of a text file, without a byte order mark; raise `UserError` when it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}); convert it.") from None


def check_strings(values: Any, what: str) -> list[str]:
    """Return a list of texts that is not empty; raise `UserError` for anything else."""
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{what} must be a list of texts, but are {str(values)[:60]!r}.")
    return values
