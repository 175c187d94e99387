"""Measurements of one finished run of a study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from eval.apps.calibrate import calibrate
from eval.data import find_data
from eval.models import load_model
from eval.report import read_evaluations, read_run_config
from eval.runner import evaluate_task
from eval.tasks import Task
from modeling_amorlip.configuration_amorlip import AmorLIPAmortizerConfig
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from training.benchmarks.heads import batch_error, error, exact_log_partitions
from training.study.study_results import RunResult


MAX_CALIBRATION_IMAGES = 1000
CALIBRATION_STEPS = 300


@dataclass
class TrainingRun:
    """What a training run left in its folder."""

    folder: Path
    model: Any
    processor: Any
    config: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> TrainingRun:
        model, processor = load_model(str(folder))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(folder, model, processor, read_run_config(folder))

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a JSON Lines log, or no lines without such a log."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(
    folder: Path, tasks: list[Task], calibrated: list[str], batch_size: int, partition_pairs: int = 0
) -> RunResult:
    """Return the result of a finished training run.

    Args:
        folder: output_dir of the run.
        tasks: tasks to evaluate, with absolute paths.
        calibrated: names of the tasks to fit heads to.
        batch_size: batch size of the estimates that the heads are compared with.
        partition_pairs: training pairs that partition errors are measured on; 0 takes all of them.
    """
    torch.set_num_threads(1)
    run = TrainingRun.load(folder)
    scores, sizes = {}, {}
    for task in tasks:
        scores[task.name], sizes[task.name] = _score(run, task)
    partition = _partition_errors(run, batch_size, partition_pairs)
    heads = {task.name: _calibrate(run, task, sizes[task.name]) for task in tasks if task.name in calibrated}
    return RunResult(
        tasks=scores,
        curve=_curve(run, tasks),
        partition=partition,
        calibrated=heads,
        logit_scale=run.model.logit_scale.detach().exp().item(),
        samples_seen=run.log("metrics")[-1]["samples_seen"],
    )


def _score(run: TrainingRun, task: Task) -> tuple[dict[str, float], int]:
    """Return the main metric by scoring, as fractions, and the number of samples of the task."""
    result = evaluate_task(run.model, run.processor, task, scorings=("cosine", "gallery"), resamples=0)
    return {name: metrics[task.main_metric].value for name, metrics in result.scores.items()}, result.num_samples


def _partition_errors(run: TrainingRun, batch_size: int, pairs: int) -> dict[str, float]:
    """Return errors in nats against exact log-partitions over the training set; see training/benchmarks/heads.py."""
    rows = datasets.load_dataset("parquet", data_files=run.config["train_data"], split="train")
    if 0 < pairs < len(rows):
        rows = rows.shuffle(seed=0).select(range(pairs))
    x = encode_images(run.model, run.processor, (row[run.config["image_column"]] for row in rows))
    y = encode_texts(run.model, run.processor, list(rows[run.config["caption_column"]]))
    scale = run.model.logit_scale.detach().exp().cpu()
    exact = exact_log_partitions(x, y, scale)
    errors = {
        "spread": error(torch.zeros_like(exact), exact),
        "batch_error": batch_error(x, y, scale, exact, batch_size),
    }
    if run.log("metrics")[-1].get("partition_error"):  # 0 if the objective fits no heads
        with torch.no_grad():
            predictions = torch.stack(run.model.amortizer.cpu()(x, y, scale))
        errors["head_error"] = error(predictions, exact)
        errors["head_bias"] = (predictions - exact).mean().item()
    return errors


def _calibrate(run: TrainingRun, task: Task, num_samples: int) -> dict[str, float]:
    """Return accuracies over the images of a task that new heads were not fitted to, by scoring."""
    heads = AmorLIPAmortizerConfig(head_type="prototype", size=256)
    images = min(MAX_CALIBRATION_IMAGES, num_samples // 2)
    data = find_data(task, run.folder)
    return calibrate(run.model, run.processor, data, heads, images, steps=CALIBRATION_STEPS)


def _curve(run: TrainingRun, tasks: list[Task]) -> list[dict[str, float]]:
    """Return the evaluations during training, each {"samples_seen": ..., task: main metric by cosine}."""
    points = {}
    file = run.folder / "eval.jsonl"
    for line in read_evaluations(file) if file.exists() else []:
        values = {result.task: result.value for result in line.results}
        points[line.step] = {
            "samples_seen": line.step * run.config["per_device_train_batch_size"],
            **{task.name: values[task.name] for task in tasks},
        }
    return list(points.values())
