"""One task on one model: samples, embeddings, scores, and metrics with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.data import TaskData, find_data
from eval.encoding import Encoder
from eval.evaluators.classification import evaluate_classification
from eval.evaluators.retrieval import evaluate_retrieval
from eval.evaluators.scored import Scored
from eval.evaluators.winogavil import evaluate_winogavil
from eval.report import Metric, TaskResult
from eval.scoring import require_amortizer
from eval.sharding import ProcessShard
from eval.tasks import ROOT, Task
from modeling_amorlip.cli_amorlip import UserError


__all__ = ["RESAMPLES", "ProcessShard", "evaluate", "evaluate_task", "unevaluated"]

RESAMPLES = 1000
MAX_NAMED = 20  # unreadable samples that a result names


def evaluate_task(
    model: Any,
    processor: Any,
    task: Task,
    data_dir: Path = ROOT,
    batch_size: int = 256,
    scorings: tuple[str, ...] = ("cosine",),
    share: ProcessShard | None = None,
    sheet: Path | None = None,
    resamples: int = RESAMPLES,
    probes: tuple[str, ...] = (),
    *,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> TaskResult:
    """Evaluate a model on a task and return the result, the same in all processes; so are errors.

    Args:
        model: Dual encoder with `get_image_features` and `get_text_features`.
        processor: Its processor.
        data_dir: Folder of the task's data, or `eval.data.HUB`.
        batch_size: Images or texts encoded at a time.
        scorings: Names in `SCORINGS`; "cosine" is always included.
        share: This process's part of the samples.
        sheet: PNG to draw of 24 images with their best captions (classification).
        resamples: Bootstrap resamples for the main metric's 95 % confidence interval; 0 leaves it out.
        probes: Names in `PROBES`, fitted to the training split of a classification task.
        num_workers: Worker processes that read images, per process; 0 uses a thread.
        dtype: Type to compute embeddings in under autocast; None leaves the model's own.

    Raises:
        UserError: The data is missing or contradicts itself, or the model has no amortizer to score with.
    """
    encoder = Encoder(model, processor, batch_size, num_workers, dtype, share or ProcessShard())
    was_training = model.training
    model.eval()
    try:
        with encoder.shard.agreement():
            require_amortizer(model, scorings)
            data = find_data(task, data_dir)
        if task.kind == "classification":
            scored = evaluate_classification(encoder, data, scorings, probes=probes, data_dir=data_dir, sheet=sheet)
        elif task.kind == "retrieval":
            scored = evaluate_retrieval(encoder, data, scorings)
        else:
            scored = evaluate_winogavil(encoder, data)
        with encoder.shard.agreement():
            return _make_result(data, scored, resamples)
    finally:
        model.train(was_training)


def unevaluated(task: Task, status: str, reason: str) -> TaskResult:
    """Return the result of a task that could not be evaluated."""
    return TaskResult(
        task=task.name,
        title=task.title,
        dataset=task.dataset,
        split=task.split,
        status=status,
        main_metric=task.main_metric,
        expected_samples=task.size,
        reason=reason,
        random_score=task.random_score,
        pixel_baseline=task.pixel_baseline,
    )


def _make_result(data: TaskData, scored: Scored, resamples: int) -> TaskResult:
    result = unevaluated(data.task, "complete", "")
    result.num_samples, result.reason = scored.num_samples, _explain_gaps(data, scored)
    result.hub_dataset = data.hub_name
    if result.reason:
        result.status = "partial"
    result.unreadable = scored.unreadable[:MAX_NAMED]
    rows = np.arange(scored.num_samples)
    for scoring, metrics in scored.metrics.items():
        values = metrics(rows) | (scored.extra if scoring == "cosine" else {})
        if data.task.main_metric not in values:
            message = f"its data gives no {data.task.main_metric}, only {', '.join(values)}"
            raise UserError(f"Task {data.task.name}: {message}.")
        result.scores[scoring] = {name: Metric(float(value)) for name, value in values.items()}
        if resamples and data.task.main_metric in metrics(rows):
            interval = _bootstrap(scored, scoring, data.task.main_metric, resamples)
            result.scores[scoring][data.task.main_metric].ci95 = interval
    return result


def _explain_gaps(data: TaskData, scored: Scored) -> str | None:
    """Return why a result is over less than the whole task, None if it is not."""
    reasons = []
    if data.task.size is not None and scored.num_samples != data.task.size:
        reasons.append(f"{scored.num_samples} samples instead of {data.task.size}")
    if data.missing_shards:
        reasons.append(f"{data.missing_shards} shards are missing")
    if scored.unreadable:
        reasons.append(f"{len(scored.unreadable)} cannot be read, the first is {scored.unreadable[0]}")
    return ", ".join(reasons) or None


def _bootstrap(scored: Scored, scoring: str, metric: str, resamples: int) -> list[float]:
    """Return a metric's 95 % confidence interval, by the percentiles of resampled samples."""
    generator, number = np.random.default_rng(0), scored.num_samples
    values = [
        scored.metrics[scoring](np.sort(generator.integers(number, size=number))).get(metric, float("nan"))
        for _ in range(resamples)
    ]
    return [float(value) for value in np.nanpercentile(values, [2.5, 97.5])]


def evaluate(
    model: Any, processor: Any, task: Task, share: ProcessShard, sheet: Path | None = None
) -> list[TaskResult]:
    """Return a task's result without confidence intervals, as training reports it."""
    return [evaluate_task(model, processor, task, share=share, sheet=sheet, resamples=0)]
