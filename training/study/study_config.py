"""Configuration of a study: the methods it compares, the data and tasks it uses, and the runs it makes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_amorlip.cli_amorlip import UserError
from training.config import build, unknown_name


@dataclass
class Method:
    """One row of the results table. `grid` adds values to the study's grid, or replaces those of the same field."""

    objective: str
    objective_args: dict = field(default_factory=dict)
    amortizer_config: dict = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)  # empty: the study's
    seeds: list[int] = field(default_factory=list)  # empty: the study's


@dataclass
class Study:
    """Settings of a study. Recipe fields have the same names as on the command line of training/pretrain.py."""

    recipe: str  # shared by all runs; the path starts from the checkout
    samples_per_epoch: int  # a multiple of every batch size, close to the size of the training set
    methods: dict[str, Method]
    development: list[str]  # tasks that select each method's setting
    report: list[str]  # tasks of the results table
    overrides: dict = field(default_factory=dict)  # recipe fields that replace the recipe's
    tasks: str | None = None  # YAML with further tasks; the path starts from the checkout, their data from --data_dir
    baseline: str = "clip"  # method that the other methods are compared with
    subject: str | None = None  # method with a table of its gains over every other method
    batch_sizes: list[int] = field(default_factory=lambda: [64])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    grid: dict[str, list] = field(default_factory=dict)  # recipe fields and the values to try, for every method
    tuning_batch_size: int = 64
    tuning_seed: int = 0
    warmup_samples: int = 0
    evaluations: int = 0  # evaluations during a run, for curves of accuracy
    partition_pairs: int = 0  # training pairs that partition errors are measured on; 0: all
    jobs: int = 2  # concurrent runs

    def __post_init__(self) -> None:
        for name in ("baseline", "subject"):
            if (value := getattr(self, name)) is not None and value not in self.methods:
                raise UserError(unknown_name(name, value, list(self.methods)))
        budgets = {name: len(self.settings(name)) for name in self.methods}
        if len(set(budgets.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in budgets.items())
            raise UserError(f"Every method needs the same budget for tuning, but the grids have these sizes: {sizes}.")
        for size in {self.tuning_batch_size, *itertools.chain(*map(self.batch_sizes_of, self.methods))}:
            if self.samples_per_epoch % size:
                raise UserError(
                    f"samples_per_epoch {self.samples_per_epoch} is not a multiple of the batch size {size}; "
                    "change one of them."
                )

    def batch_sizes_of(self, method: str) -> list[int]:
        """Return the batch sizes that a method is reported at."""
        return self.methods[method].batch_sizes or self.batch_sizes

    def seeds_of(self, method: str) -> list[int]:
        """Return the seeds that a method is reported with."""
        return self.methods[method].seeds or self.seeds

    def settings(self, method: str) -> list[dict[str, Any]]:
        """Return the settings of a method's grid, each as {recipe field: value}."""
        grid = self.grid | self.methods[method].grid
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def build_study(values: dict[str, Any]) -> Study:
    """Return the study with the given fields; raises `UserError` for a field that is unknown or of another type."""
    methods = {name: build(Method, method, f"methods.{name}.") for name, method in values.get("methods", {}).items()}
    return build(Study, {**values, "methods": methods})


def read_study(path: Path) -> Study:
    """Return the study described by a YAML file.

    Raises:
        UserError: the file cannot be read, or its content is not a valid study.
    """
    try:
        return build_study(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path} is not a study: {error}") from None
