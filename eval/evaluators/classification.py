"""Zero-shot classification by prompt ensembles (Radford et al. 2021, Section 3.1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.metrics.macro_f1 import macro_f1
from eval.metrics.mean_per_class_recall import mean_per_class_recall
from eval.metrics.top_k_accuracy import top_k_accuracy
from eval.metrics.worst_group_accuracy import worst_group_accuracy
from modeling_amorlip.embedder_amorlip import stream_texts


def build_classifier(model, processor, classes: list[str], templates: list[str], batch_size: int = 256) -> Tensor:
    """Class embeddings [C, d]: each template's embedding normalised, their mean normalised again.

    Prompts are encoded a batch at a time and summed by class, so memory does not grow with the number of templates.
    """
    prompts = (template.replace("{c}", name).replace("{}", name) for template in templates for name in classes)
    sums, start = None, 0
    for embeds in stream_texts(model, processor, prompts, batch_size):
        if sums is None:
            sums = embeds.new_zeros(len(classes), embeds.shape[1])
        sums.index_add_(0, torch.arange(start, start + len(embeds)) % len(classes), embeds)
        start += len(embeds)
    return torch.nn.functional.normalize(sums, dim=-1)


def top_classes(
    image_embeds: Tensor, classifier: Tensor, k: int, penalty: Tensor | None = None, tile_size: int = 1024
) -> Tensor:
    """The k likeliest classes of each image, best first: [I, d], [C, d] -> [I, k]; scores of one tile at a time.

    `penalty` [C] is taken off every image's cosine similarities with the classes.
    """
    k = min(k, len(classifier))
    found = []
    for tile in image_embeds.split(tile_size):
        scores = tile @ classifier.T
        found.append((scores if penalty is None else scores - penalty).topk(k).indices)
    return torch.cat(found)


def classification_metrics(
    top: np.ndarray, labels: np.ndarray, metadata: np.ndarray | None = None, ignored_groups: tuple[int, ...] = ()
) -> dict[str, float]:
    """Every metric that a classification task may name as its main one, as fractions.

    Args:
        top: the five likeliest classes [n, 5], best first. labels: [n].
        metadata: [n, m] as WILDS and the fairness tasks have it, the group in its first column.
        ignored_groups: groups that worst-group metrics leave out.
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
