"""How much a simple classifier gets out of frozen image embeddings: k nearest neighbours and a linear probe."""

from __future__ import annotations

import torch
from torch import Tensor


NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = [10.0**k for k in range(-6, 3)]


def knn(train: Tensor, train_labels: Tensor, test: Tensor, tile_size: int = 1024) -> Tensor:
    """Labels by a vote of the nearest training images, weighted by exp(cosine / temperature) (Wu et al. 2018).

    Args:
        train: [M, d] and test: [N, d], unit norm. train_labels: [M], from 0.

    Returns:
        [N]; one tile of similarities at a time.
    """
    classes, found = int(train_labels.max()) + 1, []
    for tile in test.split(tile_size):
        nearest = (tile @ train.T).topk(min(NEIGHBOURS, len(train)))
        votes = torch.zeros(len(tile), classes)
        votes.scatter_add_(1, train_labels[nearest.indices], (nearest.values / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Labels by multinomial logistic regression with an l2 penalty, whose strength is chosen on a fifth of `train`.

    Arguments and result as in `knn` (Radford et al. 2021, Section 3.2).
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: max(1, len(train) // 5)], order[max(1, len(train) // 5) :]

    def accuracy(strength: float) -> float:
        predict = _fit(train[kept], train_labels[kept], strength)
        return (predict(train[held]) == train_labels[held]).double().mean().item()

    return _fit(train, train_labels, max(STRENGTHS, key=accuracy))(test)


def _fit(embeds: Tensor, labels: Tensor, strength: float):
    """Logistic regression by L-BFGS; returns its prediction, [N, d] -> [N]."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, embeds.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(embeds @ weight.T + bias, labels)
        value = value + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda test: (test @ weight.T + bias).argmax(1)


PROBES = {"knn": knn, "linear": linear_probe}
