"""One task on one model: embeddings, scores by each way of scoring, metrics with confidence intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.data import TaskData, find_data
from eval.evaluators.classification import build_classifier, classification_metrics, top_classes
from eval.evaluators.pixel_baseline import pixel_baseline_accuracy
from eval.evaluators.probes import PROBES
from eval.evaluators.retrieval import choose, recall_hits, retrieval_metrics, winogavil_prompt
from eval.metrics.jaccard import jaccard
from eval.plots import contact_sheet
from eval.scoring import log_partition_corrections, require_amortizer
from eval.tasks import ROOT, Task
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts


RESAMPLES = 1000


@dataclass(frozen=True)
class ProcessShard:
    """This process's part of the samples: every `processes`-th, from `rank` on."""

    rank: int = 0
    processes: int = 1

    def take(self, items):
        return itertools.islice(items, self.rank, None, self.processes)

    def gather(self, values: list) -> list:
        """All processes' values in the order of the samples."""
        if self.processes == 1:
            return values
        from accelerate.utils import gather_object

        parts = gather_object([values])
        return [parts[i % self.processes][i // self.processes] for i in range(sum(map(len, parts)))]


def evaluate_task(
    model,
    processor,
    task: Task,
    data_dir: Path = ROOT,
    batch_size: int = 256,
    scorings: tuple[str, ...] = ("cosine",),
    share: ProcessShard | None = None,
    sheet: Path | None = None,
    resamples: int = RESAMPLES,
    probes: tuple[str, ...] = (),
) -> dict:
    """A task's entry in the results.

    Args:
        scorings: of `SCORINGS`; `cosine` is always there, the others stand beside it.
        share: this process's part of the samples; results are the same in all processes.
        sheet: where to draw 24 images with their best captions (classification).
        resamples: bootstrap resamples behind the main metric's 95 % confidence interval; 0 leaves it out.
        probes: of `PROBES`, fitted to the training split of a classification task, which has to be there.

    Raises:
        UserError: the data is missing or contradicts itself, or the model has no amortizer to score with.
    """
    data = find_data(task, data_dir)
    require_amortizer(model, scorings)
    evaluator = {"classification": _classification, "retrieval": _retrieval, "winogavil": _winogavil}[task.kind]
    number, by_scoring = evaluator(model, processor, data, batch_size, scorings, share or ProcessShard(), sheet)
    if probes and task.kind == "classification":
        train = find_data(task, data_dir, "train")
        by_scoring["cosine"][0].update(
            _probes(probes, model, processor, train, data, batch_size, share or ProcessShard())
        )
    results = {name: _with_interval(task, *scored, resamples) for name, scored in by_scoring.items()}
    wrong = data.missing_shards or (task.size is not None and number != task.size)
    lacks = f", {data.missing_shards} shards are missing" if data.missing_shards else ""
    return {
        "title": task.title,
        "dataset": {"name": task.repositories[0] if task.repositories else task.data, "split": task.split},
        "status": "partial" if wrong else "complete",
        "reason": f"{number} samples instead of {task.size}{lacks}" if wrong else None,
        "num_samples": number,
        "expected_samples": task.size,
        "main_metric": task.main_metric,
        "metrics": results.pop("cosine"),
        "scoring": results,
    }


def _classification(model, processor, data: TaskData, batch_size, scorings, share: ProcessShard, sheet):
    labels, metadata, embeds = _encode(model, processor, data, batch_size, share)
    labels = np.array(labels)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(data.classes):
        raise UserError(
            f"Task {data.task.name}: {len(labels)} images with labels up to {max(labels, default=None)} "
            f"and {len(data.classes)} class names do not fit together."
        )
    metadata = None if metadata[0] is None else np.stack(metadata)
    classifier = build_classifier(model, processor, data.classes, data.templates, batch_size)
    results = {}
    for scoring, penalty in log_partition_corrections(model, scorings, embeds, classifier, "text").items():
        top = top_classes(embeds, classifier, 5, penalty).numpy()

        def metrics(rows, top=top):
            return classification_metrics(
                top[rows], labels[rows], None if metadata is None else metadata[rows], data.task.ignored_groups
            )

        results[scoring] = metrics(np.arange(len(labels))), metrics, len(labels)
    if data.task.groups == ("demo",) or data.task.pixel_reference:
        present = torch.from_numpy(np.unique(labels))
        groups = torch.from_numpy(labels)
        results["cosine"][0].update(
            retrieval_metrics(
                recall_hits(embeds, classifier[present], groups, present),
                recall_hits(classifier[present], embeds, present, groups),
            )
        )
    if data.task.pixel_reference:
        results["cosine"][0]["pixel_baseline_acc1"] = _pixel_baseline(data, labels)
    if sheet is not None and share.rank == 0:
        _draw(sheet, data, embeds, classifier, labels)
    return len(labels), results


def _probes(
    names, model, processor, train: TaskData, test: TaskData, batch_size: int, share: ProcessShard
) -> dict[str, float]:
    """{"knn_acc1": ..., ...}: accuracies of classifiers fitted to a training split."""
    (labels, _, embeds), (truth, _, queries) = (
        _encode(model, processor, data, batch_size, share) for data in (train, test)
    )
    labels, truth = torch.tensor(labels), torch.tensor(truth)
    return {f"{name}_acc1": (PROBES[name](embeds, labels, queries) == truth).double().mean().item() for name in names}


def _retrieval(model, processor, data: TaskData, batch_size, scorings, share: ProcessShard, sheet):
    captions: list[list[str]] = []
    _, _, embeds = _encode(model, processor, data, batch_size, share, captions)
    image_groups = torch.arange(len(captions))
    text_groups = torch.tensor([i for i, lines in enumerate(captions) for _ in lines])
    texts = encode_texts(model, processor, itertools.chain.from_iterable(captions), batch_size)
    results = {}
    for_texts = log_partition_corrections(model, scorings, embeds, texts, "text")
    for_images = log_partition_corrections(model, scorings, texts, embeds, "image")
    for scoring in for_texts:
        to_text = recall_hits(embeds, texts, image_groups, text_groups, for_texts[scoring])
        to_image = recall_hits(texts, embeds, text_groups, image_groups, for_images[scoring])

        def metrics(rows, to_text=to_text, to_image=to_image):
            chosen = torch.zeros(len(to_text), dtype=torch.long).index_add_(
                0, torch.from_numpy(rows), torch.ones(len(rows), dtype=torch.long)
            )
            return retrieval_metrics(
                to_text[torch.from_numpy(rows)], to_image.repeat_interleave(chosen[text_groups], dim=0)
            )

        results[scoring] = metrics(np.arange(len(captions))), metrics, len(captions)
    return len(captions), results


def _winogavil(model, processor, data: TaskData, batch_size, scorings, share: ProcessShard, sheet):
    mine = list(share.take(data.samples()))
    images = encode_images(model, processor, (i for sample in mine for i in sample.decode()), batch_size)
    cues = encode_texts(model, processor, [winogavil_prompt(sample.cue) for sample in mine], batch_size)
    parts = images.split([len(sample.images) for sample in mine])
    answers = share.gather(
        [
            (choose(part, cue, len(sample.associations)), sample.associations, len(part))
            for part, cue, sample in zip(parts, cues, mine, strict=True)
        ]
    )

    def metrics(rows):
        chosen = [answers[i] for i in rows]
        scores = {"jaccard_score": jaccard([a for a, _, _ in chosen], [b for _, b, _ in chosen])}
        for name, sizes in (("5-6", (5, 6)), ("10-12", (10, 12))):
            if part := [answer for answer in chosen if answer[2] in sizes]:
                scores[f"jaccard_score_{name}"] = jaccard([a for a, _, _ in part], [b for _, b, _ in part])
        return scores

    return len(answers), {"cosine": (metrics(np.arange(len(answers))), metrics, len(answers))}


def _encode(model, processor, data: TaskData, batch_size: int, share: ProcessShard, captions: list | None = None):
    """(labels, metadata, image embeddings [I, d]) of all samples; also fills `captions`."""
    about = []

    def images():
        progress = tqdm(
            share.take(data.samples()), desc=data.task.title, unit="img", leave=False, disable=share.rank > 0
        )
        for sample in progress:
            about.append((sample.label, sample.metadata, sample.captions))
            yield sample.decode()[0]

    embeds = encode_images(model, processor, images(), batch_size)
    gathered = share.gather(list(zip(about, embeds, strict=True)))
    if captions is not None:
        captions += [lines for (_, _, lines), _ in gathered]
    return (
        [label for (label, _, _), _ in gathered],
        [values for (_, values, _), _ in gathered],
        torch.stack([embed for _, embed in gathered]),
    )


def _with_interval(task: Task, values: dict[str, float], metrics: Callable, number: int, resamples: int) -> dict:
    """{metric: {"value", "ci95"}}; the main metric's interval by the bootstrap's percentiles."""
    if task.main_metric not in values:
        raise UserError(f"Task {task.name}: its data gives no {task.main_metric}, only {', '.join(values)}.")
    interval = None
    if resamples:
        generator = np.random.default_rng(0)
        drawn = (metrics(np.sort(generator.integers(number, size=number))) for _ in range(resamples))
        samples = [values.get(task.main_metric, float("nan")) for values in drawn]
        interval = [float(v) for v in np.nanpercentile(samples, [2.5, 97.5])]
    return {
        name: {"value": float(value), "ci95": interval if name == task.main_metric else None}
        for name, value in values.items()
    }


def _pixel_baseline(data: TaskData, labels: np.ndarray) -> float:
    import datasets

    path = ROOT / data.task.pixel_reference
    reference = datasets.load_dataset("parquet", data_files=str(path), split="train")
    names = [data.classes[label] for label in labels]
    images = (sample.decode()[0] for sample in data.samples())
    return pixel_baseline_accuracy(images, names, (row["image"] for row in reference), reference["caption"])


def _draw(path: Path, data: TaskData, embeds: Tensor, classifier: Tensor, labels: np.ndarray) -> None:
    chosen = torch.linspace(0, len(labels) - 1, min(24, len(labels))).long().tolist()
    best = top_classes(embeds[chosen], classifier, 5).tolist()
    wanted = set(chosen)
    images = [s.decode()[0].convert("RGB") for i, s in enumerate(data.samples()) if i in wanted]
    names = [data.classes[labels[i]] for i in chosen]
    contact_sheet(images, names, [[data.classes[c] for c in row] for row in best], path)


def evaluate(model, processor, task: Task, share: ProcessShard, sheet: Path | None = None) -> list[dict]:
    """A task's metrics while a model is trained: [{"task", "metric", "value" (a fraction), "num_samples"}, ...]."""
    entry = evaluate_task(model, processor, task, share=share, sheet=sheet, resamples=0)
    return [
        {"task": task.name, "metric": name, "value": metric["value"], "num_samples": entry["num_samples"]}
        for name, metric in entry["metrics"].items()
    ]
