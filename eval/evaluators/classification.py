"""Zero-shot classification by prompt ensembles (Radford et al. 2021, Section 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.data import TaskData, find_data
from eval.encoding import EncodedSamples, Encoder, encode_samples
from eval.evaluators.probes import PROBES
from eval.evaluators.retrieval import recall_hits, retrieval_metrics
from eval.evaluators.scored import Metrics, Scored
from eval.metrics.macro_f1 import macro_f1
from eval.metrics.mean_per_class_recall import mean_per_class_recall
from eval.metrics.top_k_accuracy import top_k_accuracy
from eval.metrics.worst_group_accuracy import worst_group_accuracy
from eval.plots import contact_sheet
from eval.scoring import SinkhornSettings, log_partition_corrections
from eval.tables import fill_template
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import stream_texts


CLASSES_PER_CHUNK = 128
SHEET_IMAGES = 24


def build_classifier(
    model: Any, processor: Any, classes: list[str], templates: list[str], batch_size: int = 256
) -> Tensor:
    """Return class embeddings [C, d]: the normalized mean of the normalized embeddings of a class's prompts.

    Prompts are encoded a batch at a time and summed by class, so memory does not grow with the number of templates.
    """
    prompts = (fill_template(template, name) for template in templates for name in classes)
    sums: Tensor | None = None
    start = 0
    for embeds in stream_texts(model, processor, prompts, batch_size):
        if sums is None:
            sums = embeds.new_zeros(len(classes), embeds.shape[1])
        sums.index_add_(0, torch.arange(start, start + len(embeds)) % len(classes), embeds)
        start += len(embeds)
    if sums is None:
        raise ValueError("a classifier needs at least one class and one template")
    return torch.nn.functional.normalize(sums, dim=-1)


def top_classes(
    image_embeds: Tensor, classifier: Tensor, k: int, correction: Tensor | None = None, tile_size: int = 1024
) -> Tensor:
    """Return the k most likely classes of each image, best first: [I, d], [C, d] -> [I, k].

    Scores of one tile of images are held at a time.

    Args:
        correction: [C], subtracted from every image's cosine similarities with the classes.
    """
    k = min(k, len(classifier))
    best = []
    for tile in image_embeds.split(tile_size):
        scores = tile @ classifier.T
        best.append((scores if correction is None else scores - correction).topk(k).indices)
    return torch.cat(best)


def classification_metrics(
    top: np.ndarray, labels: np.ndarray, metadata: np.ndarray | None = None, ignored_groups: tuple[int, ...] = ()
) -> dict[str, float]:
    """Return every metric that a classification task may name as its main one, as fractions.

    Args:
        top: The five most likely classes [n, 5], best first.
        labels: True classes [n].
        metadata: [n, m] as in WILDS and the fairness tasks, with the group in its first column.
        ignored_groups: Groups that worst-group metrics leave out.
    """
    metrics = {
        "acc1": top_k_accuracy(top, labels),
        "acc5": top_k_accuracy(top, labels, 5),
        "mean_per_class_recall": mean_per_class_recall(top[:, 0], labels),
        "F1-macro_all": macro_f1(top[:, 0], labels),
    }
    if metadata is not None:
        worst = worst_group_accuracy(top, labels, metadata[:, 0], 1, ignored_groups)
        metrics |= {
            "acc_worst_region": worst,  # FMoW's name
            "acc_wg": worst,  # GeoDE's
            "acc_top5_wg": worst_group_accuracy(top, labels, metadata[:, 0], 5, ignored_groups),
        }
    return metrics


def evaluate_classification(
    encoder: Encoder,
    data: TaskData,
    scorings: tuple[str, ...],
    *,
    sinkhorn: SinkhornSettings | None = None,
    probes: tuple[str, ...] = (),
    data_dir: Path | None = None,
    sheet: Path | None = None,
) -> Scored:
    """Score a classification task's images against its classes.

    Args:
        scorings: Names in `SCORINGS`.
        sinkhorn: Settings of Sinkhorn scoring.
        probes: Names in `PROBES`, fitted to the training split in `data_dir`.
        sheet: PNG to draw of images with their five best classes.

    Raises:
        UserError: Labels and class names do not fit together, or the training split is missing.
    """
    samples = encode_samples(encoder, data)
    classifier = _build_sharded_classifier(encoder, data)
    with encoder.shard.agreement():
        _check_labels(data, samples.labels)
        prior = _class_prior(data)
        corrections = log_partition_corrections(
            encoder.model, scorings, samples.image_embeds, classifier, "text", sinkhorn=sinkhorn, prior=prior
        )
        scored = _score(data, samples, classifier, corrections)
    if probes:
        scored.extra |= _fit_probes(encoder, data, samples, probes, data_dir)
    with encoder.shard.agreement():
        if sheet is not None and encoder.shard.rank == 0:
            _draw(sheet, data, samples, classifier)
    return scored


def _build_sharded_classifier(encoder: Encoder, data: TaskData) -> Tensor:
    """Return class embeddings [C, d] that all processes encode together, in chunks of classes."""
    classes, shard = data.classes, encoder.shard
    starts = range(0, len(classes), CLASSES_PER_CHUNK)
    with shard.agreement(), encoder.autocast():
        chunks = []
        places: list[int] = []
        for start in shard.take(starts):
            names = classes[start : start + CLASSES_PER_CHUNK]
            chunk = build_classifier(encoder.model, encoder.processor, names, data.templates, encoder.batch_size)
            chunks.append(chunk)
            places += range(start, start + len(names))
        local = torch.cat(chunks) if chunks else torch.zeros(0, 0)
    order = shard.gather(torch.tensor(places, dtype=torch.int64)).argsort()
    return shard.gather(local)[order]


def _check_labels(data: TaskData, labels: Tensor) -> None:
    if labels.min() < 0 or labels.max() >= len(data.classes):
        raise UserError(
            f"Task {data.task.name}: labels from {int(labels.min())} to {int(labels.max())} and {len(data.classes)} "
            "class names do not fit together; labels count from 0."
        )


def _class_prior(data: TaskData) -> Tensor | None:
    """Return the task's expected shares of classes [C], None if it gives none."""
    prior = data.task.class_prior
    if prior and (len(prior) != len(data.classes) or not all(0 < value < float("inf") for value in prior)):
        raise UserError(
            f"Task {data.task.name}: class_prior has {len(prior)} values for {len(data.classes)} classes; "
            "give one value above 0 per class."
        )
    return torch.tensor(prior) if prior else None


def _score(data: TaskData, samples: EncodedSamples, classifier: Tensor, corrections: dict[str, Tensor]) -> Scored:
    labels = samples.labels.numpy()
    metadata = samples.metadata.numpy() if samples.metadata.shape[1] else None
    scored = Scored(len(samples), {}, unreadable=samples.unreadable)
    for scoring, correction in corrections.items():
        top = top_classes(samples.image_embeds, classifier, 5, correction).numpy()
        scored.metrics[scoring] = _make_metrics(top, labels, metadata, data.task.ignored_groups)
    if data.task.class_retrieval:
        classes = samples.labels.unique()
        scored.extra |= retrieval_metrics(
            recall_hits(samples.image_embeds, classifier[classes], samples.labels, classes),
            recall_hits(classifier[classes], samples.image_embeds, classes, samples.labels),
        )
    return scored


def _make_metrics(
    top: np.ndarray, labels: np.ndarray, metadata: np.ndarray | None, ignored_groups: tuple[int, ...]
) -> Metrics:
    def metrics(rows: np.ndarray) -> dict[str, float]:
        chosen = None if metadata is None else metadata[rows]
        return classification_metrics(top[rows], labels[rows], chosen, ignored_groups)

    return metrics


def _fit_probes(
    encoder: Encoder, data: TaskData, samples: EncodedSamples, probes: tuple[str, ...], data_dir: Path | None
) -> dict[str, float]:
    """Return {"knn_acc1": ..., ...}: accuracies of classifiers that are fitted to the training split."""
    with encoder.shard.agreement():
        if data.task.split == "train" or data_dir is None:
            raise UserError(
                f"Task {data.task.name}: --probe needs a training split other than the {data.task.split} split "
                "that is evaluated."
            )
        train_data = find_data(data.task, data_dir, "train")
        train_data.align_labels(data)
    train = encode_samples(encoder, train_data)
    with encoder.shard.agreement():
        _check_labels(train_data, train.labels)
        return {
            f"{name}_acc1": _accuracy(PROBES[name](train.image_embeds, train.labels, samples.image_embeds), samples)
            for name in probes
        }


def _accuracy(predictions: Tensor, samples: EncodedSamples) -> float:
    return (predictions == samples.labels).double().mean().item()


def _draw(path: Path, data: TaskData, samples: EncodedSamples, classifier: Tensor) -> None:
    """Draw images from all over the data, with their five best classes."""
    chosen = torch.linspace(0, len(samples) - 1, min(SHEET_IMAGES, len(samples))).long()
    best = top_classes(samples.image_embeds[chosen], classifier, 5).tolist()
    images = [sample.decode()[0] for sample in data.read(samples.positions[chosen].tolist())]
    names = [data.classes[label] for label in samples.labels[chosen].tolist()]
    contact_sheet(images, names, [[data.classes[place] for place in row] for row in best], path)
