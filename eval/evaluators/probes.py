"""Simple classifiers on frozen image embeddings: k nearest neighbors and a linear probe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


NUM_NEIGHBORS, TEMPERATURE = 20, 0.07
L2_STRENGTHS = [10.0**k for k in range(-6, 3)]


def knn(train: Tensor, train_labels: Tensor, test: Tensor, tile_size: int = 1024) -> Tensor:
    """Return labels [N] by a vote of the nearest training images, weighted by exp(cosine / temperature).

    From Wu et al. 2018, Section 3.4. One tile of similarities is held at a time.

    Args:
        train: [M, d], unit norm.
        train_labels: [M], counted from 0.
        test: [N, d], unit norm.
    """
    num_classes, predictions = int(train_labels.max()) + 1, []
    for tile in test.split(tile_size):
        nearest = (tile @ train.T).topk(min(NUM_NEIGHBORS, len(train)))
        votes = torch.zeros(len(tile), num_classes)
        votes.scatter_add_(1, train_labels[nearest.indices], (nearest.values / TEMPERATURE).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Return labels [N] by multinomial logistic regression with an l2 penalty (Radford et al. 2021, Section 3.2).

    A fifth of `train` decides the strength of the penalty. Arguments are those of `knn`.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    number = max(1, len(train) // 5)
    held_out, rest = order[:number], order[number:]

    def accuracy(strength: float) -> float:
        predict = _fit(train[rest], train_labels[rest], strength)
        return (predict(train[held_out]) == train_labels[held_out]).double().mean().item()

    return _fit(train, train_labels, max(L2_STRENGTHS, key=accuracy))(test)


def _fit(embeds: Tensor, labels: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Fit a logistic regression by L-BFGS and return its prediction, [N, d] -> [N]."""
    num_classes = int(labels.max()) + 1
    weight = torch.zeros(num_classes, embeds.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(embeds @ weight.T + bias, labels)
        loss = loss + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda test: (test @ weight.T + bias).argmax(1)


PROBES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"knn": knn, "linear": linear_probe}
