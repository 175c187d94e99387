"""One task on one model: samples, embeddings, scores, and metrics with confidence intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from eval.identity import result_identity
from eval.models import ModelRecord
from eval.report import Metric, TaskResult
from eval.scoring import SCORING_MODES, SCORINGS, SinkhornSettings, require_amortizer, scoring_name
from eval.sharding import ProcessShard
from eval.tasks import ROOT, Task
from modeling_amorlip.cli_amorlip import UserError


__all__ = ["RESAMPLES", "EvaluationOptions", "ProcessShard", "evaluate_task", "unevaluated"]

RESAMPLES = 1000
MAX_NAMED = 20  # unreadable samples that a result names


@dataclass(frozen=True)
class EvaluationOptions:
    """Further options of `evaluate_task`.

    Args:
        num_workers: Worker processes that read images, per process; 0 uses a thread.
        dtype: Type to compute embeddings in under autocast; None leaves the model's own.
        sinkhorn: Settings of Sinkhorn scoring.
        model_record: What identifies the model; the result's identity is left out without it.
        previous: Earlier result, returned as it is if its identity is the same.
    """

    num_workers: int = 0
    dtype: torch.dtype | None = None
    sinkhorn: SinkhornSettings = SinkhornSettings()
    model_record: ModelRecord | None = None
    previous: TaskResult | None = None


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
    options: EvaluationOptions | None = None,
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
        options: Further options.

    Raises:
        UserError: The data is missing or contradicts itself, or the model has no amortizer to score with.
    """
    options = options or EvaluationOptions()
    scorings = tuple(name for name in SCORINGS if name in map(scoring_name, ("cosine", *scorings)))
    probes = probes if task.kind == "classification" else ()
    encoder = Encoder(model, processor, batch_size, options.num_workers, options.dtype, share or ProcessShard())
    with encoder.shard.agreement():
        require_amortizer(model, scorings)
        data = find_data(task, data_dir)
        identity = _identify(data, data_dir, scorings, resamples, probes, options)
        is_done = options.previous is not None and bool(identity) and options.previous.identity == identity
    # The first process decides, as the others may not see its files.
    if (previous := encoder.shard.gather_objects([options.previous if is_done else None])[0]) is not None:
        return previous
    scored = _evaluate_kind(encoder, data, scorings, options.sinkhorn, probes, data_dir, sheet)
    with encoder.shard.agreement():
        result = _make_result(data, scored, resamples)
    result.identity = identity
    return result


def _evaluate_kind(
    encoder: Encoder,
    data: TaskData,
    scorings: tuple[str, ...],
    sinkhorn: SinkhornSettings,
    probes: tuple[str, ...],
    data_dir: Path,
    sheet: Path | None,
) -> Scored:
    """Return a task's scores from the evaluator of its kind, with the model in evaluation mode."""
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        if data.task.kind == "classification":
            return evaluate_classification(
                encoder, data, scorings, sinkhorn=sinkhorn, probes=probes, data_dir=data_dir, sheet=sheet
            )
        if data.task.kind == "retrieval":
            return evaluate_retrieval(encoder, data, scorings, sinkhorn=sinkhorn)
        return evaluate_winogavil(encoder, data)
    finally:
        encoder.model.train(was_training)


def _identify(
    data: TaskData,
    data_dir: Path,
    scorings: tuple[str, ...],
    resamples: int,
    probes: tuple[str, ...],
    options: EvaluationOptions,
) -> dict[str, str]:
    """Return the identity of the result to come, {} for a model without a record."""
    if options.model_record is None:
        return {}
    splits = [data, *([find_data(data.task, data_dir, "train")] if probes else [])]
    settings = {
        "scorings": scorings,
        "sinkhorn": asdict(options.sinkhorn) if "sinkhorn" in scorings else None,
        "probes": sorted(probes),
        "resamples": resamples,
        "dtype": str(options.dtype),
    }
    return result_identity(options.model_record, data.task, [split.fingerprint() for split in splits], settings)


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
        result.modes[scoring] = SCORING_MODES[scoring]
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
