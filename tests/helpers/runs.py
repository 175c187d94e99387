"""Training runs in this process, and what a run left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from training.build import build_trainer
from training.config import parse_config
from training.trainer import Trainer


TIMES = ("samples_per_second", "step_time", "data_wait", "tflops_per_second", "mfu")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer handles it."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as runs in processes of their own do: sums come out equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(recipe_path: Path, *options: object) -> Trainer:
    """Build the trainer of a recipe with command-line options."""
    AcceleratorState._reset_state(True)
    return build_trainer(parse_config(["--config", str(recipe_path), *map(str, options)]))


def train(recipe_path: Path, *options: object) -> Trainer:
    """Build the trainer of a recipe and train."""
    with one_thread():
        trainer = build(recipe_path, *options)
        trainer.train()
    return trainer


def fail_in_step(trainer: Trainer, step: int, error: BaseException) -> None:
    """Make a trainer raise an error before it trains on its `step`-th batch."""
    training_step = trainer.training_step

    def failing_step(batch: dict[str, Any], logs: bool = False) -> dict[str, torch.Tensor]:
        if trainer.state.step + 1 == step:
            raise error
        return training_step(batch, logs)

    trainer.training_step = failing_step


def train_until_killed(recipe_path: Path, step: int, *options: object) -> None:
    """Train like a process that is killed in its `step`-th step."""
    with one_thread():
        trainer = build(recipe_path, *options)
        fail_in_step(trainer, step, Killed())
        with contextlib.suppress(Killed):
            trainer.train()
            raise AssertionError("the run ended before it was killed")


def read_metrics(folder: Path, drop: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, without those that depend on the machine's speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def assert_same_weights(a: Path, b: Path) -> None:
    """Assert that the models in two folders are equal to the last bit."""
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
