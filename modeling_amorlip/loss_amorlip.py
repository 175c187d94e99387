"""The mathematics of AmorLIP: pure functions on embeddings, streamed over tiles, in log space.

Notation (paper symbol in brackets): `image_embeds` [x] and `text_embeds` [y] are N x d, `logit_scale` [s = 1/tau] is
the scale itself (not its logarithm), `logit_bias` [b], and the logits are l_ij = s <x_i, y_j> + b. The positive pairs
are on the diagonal and enter a partition sum with the weight `positive_weight` [c]:

    Z_i = sum_{j != i} exp(l_ij) + c exp(l_ii)            (over texts, for image i)
    Z_j = sum_{i != j} exp(l_ij) + c exp(l_jj)            (over images, for text j)

No function holds an N x N matrix; memory is O(N d) (see `tiles_amorlip`).

With `negatives="global"` the texts of all ranks are gathered, unless the caller already has them (`gathered_texts`),
and each rank computes its rows of the global matrix. As with `torch.distributed.nn.all_gather`, gradients are those of
the *sum* of all ranks' losses, each of which is a mean over its own pairs; DDP's averaging of gradients then gives the
gradient of the global mean. All ranks must hold the same number of pairs. With `negatives="local"` a rank compares its
images with its own texts only, and nothing is communicated.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from .distributed_amorlip import all_gather, first_row, world_size
from .kernels_amorlip import kernels_run_on
from .tiles_amorlip import LogPartitions, PairSum, exponential_pass, sigmoid_pass


Negatives = Literal["local", "global"]
TILE_SIZE, TILE_SIZE_ON_GPU = 1024, 4096
AMORTIZATION_OBJECTIVES = ("l2_log", "kl", "kl_sym", "js", "conjugate")
LARGEST_EXPONENT = 30.0


def log_partitions(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    positive_weight: float = 1e-3,
    negatives: Negatives = "local",
    gathered_texts: Tensor | None = None,
    tile_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-partitions of a batch in both directions, log Z_i and log Z_j (paper Section 3.2; sums, not means).

    Args:
        image_embeds: [N, d], unit norm. text_embeds: [N, d], unit norm; row i belongs to image i.
        logit_scale: scalar s > 0. logit_bias: scalar b or None.
        positive_weight: c >= 0. 1 gives InfoNCE's denominator, 0 the decoupled one (then -inf at N = 1).
        negatives: "local" sums over this rank's pairs, "global" over those of all ranks.
        gathered_texts: [ranks * N, d], what `gather_texts` returned, to avoid gathering them again.
        tile_size: edge of the largest block of logits held at a time.

    Returns:
        `(log_z_image [N], log_z_text [N])` in nats, float32 (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: the shapes differ, `positive_weight` is negative or `negatives` is unknown.
    """
    tile_size = _check_pairs(image_embeds, text_embeds, positive_weight, tile_size)
    image_embeds, text_embeds = _in_autocast_dtype(image_embeds), _in_autocast_dtype(text_embeds)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    columns, offset = _columns(text_embeds, negatives, gathered_texts)
    return LogPartitions.apply(image_embeds, text_embeds, scale, bias, columns, offset, positive_weight, tile_size)


def cross_log_partitions(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    tile_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exps of the logits between any images and any texts, of which none are positive pairs.

    Args:
        image_embeds: [I, d]. text_embeds: [T, d].
        Others as in `log_partitions`.

    Returns:
        `(log_z_image [I], log_z_text [T])`: over all texts and over all images; sums, not means. In nats, float32
        (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: the embeddings differ in width, or there are none.
    """
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            "image_embeds and text_embeds must have shapes [I, d] and [T, d]; "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    if len(image_embeds) == 0 or len(text_embeds) == 0:
        raise ValueError(f"There are {len(image_embeds)} images and {len(text_embeds)} texts; give at least one each.")
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    tile_size = _resolve_tile_size(image_embeds, tile_size)
    return LogPartitions.apply(image_embeds, text_embeds, scale, bias, None, 0, 1.0, tile_size)


def amortized_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    log_partition_image: Tensor,
    log_partition_text: Tensor,
    *,
    logit_bias: Tensor | float | None = None,
    positive_weight: float = 1e-3,
    negatives: Negatives = "local",
    gathered_texts: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Return the encoders' loss given amortized log-partitions (paper Eq. 6), a mean over this rank's pairs.

        L = -2 mean_i l_ii + mean_i exp(log Z_i - log lambda_i) + mean_j exp(log Z_j - log lambda_j)

    With lambda fixed this is a plain sum over pairs, so one pass over tiles yields the value and every gradient. When
    lambda is the batch's own Z, the gradient is twice that of InfoNCE (c = 1) or of the decoupled loss (c = 0).

    Args:
        log_partition_image: log lambda_i [N], in the units of `log_partitions` (a sum over the pairs that `negatives`
            selects). log_partition_text: log lambda_j [N]. No gradient flows into either.
        Others as in `log_partitions`.
    """
    tile_size = _check_pairs(image_embeds, text_embeds, positive_weight, tile_size)
    image_embeds, text_embeds = _in_autocast_dtype(image_embeds), _in_autocast_dtype(text_embeds)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    _check_log_partitions(image_embeds, log_partition_image=log_partition_image, log_partition_text=log_partition_text)
    columns, offset = _columns(text_embeds, negatives, gathered_texts)
    log_image, log_text = (value.detach().to(scale.dtype) for value in (log_partition_image, log_partition_text))
    compute = functools.partial(
        exponential_pass,
        row_shift=log_image,
        column_shift=log_text if columns is None else all_gather(log_text),
        row_coefficient=torch.ones_like(scale),
        column_coefficient=torch.ones_like(scale),
        positive_weight=positive_weight,
        tile_size=tile_size,
        pull=2.0,
    )
    return PairSum.apply(image_embeds, text_embeds, scale, bias, columns, offset, compute)


def sigmoid_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    negatives: Negatives = "local",
    gathered_texts: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Return SigLIP's loss, a binary classification of every pair (Zhai et al. 2023, Eq. 1).

        L = 1/N sum_ij softplus(-l_ij if i = j else l_ij)

    The sum is over this rank's N images and the texts that they are compared with. Arguments as in `log_partitions`.
    """
    tile_size = _check_pairs(image_embeds, text_embeds, 1.0, tile_size)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    columns, offset = _columns(text_embeds, negatives, gathered_texts)
    compute = functools.partial(sigmoid_pass, tile_size=tile_size)
    return PairSum.apply(image_embeds, text_embeds, scale, bias, columns, offset, compute)


def amortization_loss(
    log_lambda: Tensor,
    log_target: Tensor,
    *,
    objective: str = "l2_log",
    log_z_batch: Tensor | None = None,
    regularizer: float = 0.1,
) -> Tensor:
    """Return how far the amortizer's log-partitions are from their targets, a mean over N.

    With P the conditional whose partition is the target t and Q the one whose partition is lambda, both measures
    P(y) exp(l) / partition, all that a divergence between them depends on is their masses p = Z / t and q = Z / lambda,
    Z being the batch estimate. Divergences of measures carry mass terms, which vanish when both are 1 and without which
    the minimum would lie at lambda = e t:

        l2_log     (log lambda - log t)^2                                                  (paper Eq. 10)
        kl         KL(Q | P) = q log(q / p) - q + p                                        (Eq. 9)
        kl_sym     KL(Q | P) + KL(P | Q) = (q - p) log(q / p)
        js         (p log(p / m) + q log(q / m)) / 2 with m = (p + q) / 2
        conjugate  exp(log Z - h) + h - 1 with h = log lambda: linear in Z, so unbiased    (NeuCLIP's duality)

    Args:
        log_lambda: log lambda [N], the head's prediction. log_target: log t [N], the blended target (Eq. 12).
        objective: one of the above.
        log_z_batch: log Z [N], which `log_target` stands in for when it is None; `l2_log` does not need it.
        regularizer: weight of the `l2_log` that is added to `kl`, `kl_sym` and `js`.

    Returns:
        A scalar in squared nats (`l2_log`) or nats. Exponentials continue along their tangent above
        `LARGEST_EXPONENT`, so that a head that is far off gets a large finite gradient.
    """
    log_lambda = log_lambda.to(_compute_dtype(log_lambda))
    log_z = log_target if log_z_batch is None else log_z_batch
    if objective == "conjugate":
        return (_exp(log_z - log_lambda) + log_lambda - 1).mean()
    squares = (log_lambda - log_target).square()
    if objective == "l2_log":
        return squares.mean()
    return (_divergence(objective, log_z - log_target, log_z - log_lambda) + regularizer * squares).mean()


def _divergence(objective: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return a divergence of `amortization_loss` between measures of masses p and q, elementwise."""
    p, q = _exp(log_p), _exp(log_q)
    if objective == "kl":
        return q * (log_q - log_p) - q + p
    if objective == "kl_sym":
        return (q - p) * (log_q - log_p)
    if objective == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    raise ValueError(f"Unknown amortization objective {objective!r}; choose one of {AMORTIZATION_OBJECTIVES}.")


def positive_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> Tensor:
    """Return logits of the matching pairs, l_ii = s <x_i, y_i> + b, as a tensor [N] of at least float32."""
    dtype = _compute_dtype(image_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = (image_embeds.to(dtype) * text_embeds.to(dtype)).sum(-1) * logit_scale
        return logits if logit_bias is None else logits + logit_bias


def blend_log_targets(log_partition_previous: Tensor, log_z_batch: Tensor, beta: float) -> Tensor:
    """Return log(beta lambda_prev + (1 - beta) Z), the blended target (paper Eq. 12); tensors [N], beta in [0, 1)."""
    if beta <= 0:
        return log_z_batch
    return torch.logaddexp(log_partition_previous + math.log(beta), log_z_batch + math.log1p(-beta))


def gather_texts(text_embeds: Tensor, negatives: Negatives) -> Tensor | None:
    """Return the texts of all ranks [ranks * N, d] without gradient, or None where a rank sees its own only."""
    if negatives not in ("local", "global"):
        raise ValueError(f"negatives must be 'local' or 'global', got {negatives!r}.")
    return all_gather(text_embeds) if negatives == "global" and world_size() > 1 else None


def _columns(text_embeds: Tensor, negatives: Negatives, gathered: Tensor | None) -> tuple[Tensor | None, int]:
    """Return (gathered texts or None, column of this rank's first text)."""
    columns = gather_texts(text_embeds, negatives) if gathered is None else _in_autocast_dtype(gathered)
    return columns, 0 if columns is None else first_row(len(text_embeds))


def _check_pairs(image_embeds: Tensor, text_embeds: Tensor, positive_weight: float, tile_size: int | None) -> int:
    """Return the tile size to use; raise ValueError on arguments that make no sense."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "image_embeds and text_embeds must both have shape [N, d], one row per pair; "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    if len(image_embeds) == 0:
        raise ValueError("The batch is empty: image_embeds and text_embeds need at least one pair.")
    if positive_weight < 0:
        raise ValueError(f"positive_weight must be at least 0, got {positive_weight}.")
    return _resolve_tile_size(image_embeds, tile_size)


def _check_log_partitions(image_embeds: Tensor, **log_partitions: Tensor) -> None:
    for name, value in log_partitions.items():
        if value.shape != image_embeds.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(image_embeds)}], got {list(value.shape)}.")


def _resolve_tile_size(embeds: Tensor, tile_size: int | None) -> int:
    if tile_size is None:
        return TILE_SIZE_ON_GPU if embeds.is_cuda else TILE_SIZE
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}.")
    return tile_size


def _in_autocast_dtype(embeds: Tensor) -> Tensor:
    """Under autocast, cast float32 embeddings to its dtype where there are kernels for it."""
    device = embeds.device
    if embeds.dtype != torch.float32 or not (torch.is_autocast_enabled(device.type) and kernels_run_on(device)):
        return embeds
    return embeds.to(torch.get_autocast_dtype(device.type))


def _exp(value: Tensor) -> Tensor:
    """Return exp(value), continued by its tangent above `LARGEST_EXPONENT`."""
    excess = (value - LARGEST_EXPONENT).clamp_min(0)
    return (value - excess).exp() * (1 + excess)


def _compute_dtype(embeds: Tensor) -> torch.dtype:
    return torch.float64 if embeds.dtype == torch.float64 else torch.float32


def _as_scalars(embeds: Tensor, *values: Tensor | float | None) -> tuple[Tensor, ...]:
    """Return 0-dimensional tensors in the computing dtype, made on the embeddings' device; None becomes 0."""
    dtype = _compute_dtype(embeds)
    return tuple(
        value.to(embeds.device, dtype).reshape(())
        if isinstance(value, Tensor)
        else torch.full((), value or 0.0, dtype=dtype, device=embeds.device)
        for value in values
    )
