"""The mathematics of AmorLIP: pure functions on embeddings, streamed over tiles, in log space.

Notation (paper symbol in brackets): `image_embeds` [x] and `text_embeds` [y] are N x d, `logit_scale` [s = 1/tau] is
the scale itself (not its logarithm), `logit_bias` [b], and the logits are l_ij = s <x_i, y_j> + b. The positive pairs
lie on the diagonal and enter a partition sum with the weight `positive_weight` [c]:

    Z_i = sum_{j != i} exp(l_ij) + c exp(l_ii)            (over texts, for image i)
    Z_j = sum_{i != j} exp(l_ij) + c exp(l_jj)            (over images, for text j)

No function holds an N x N matrix; memory is O(N d) (see `tiles_amorlip`).

With `negatives="global"` the texts of all processes are gathered, unless the caller has them already
(`gathered_texts`), and each process does its rows of the global matrix. As with `torch.distributed.nn.all_gather`,
gradients are those of the *sum* of all processes' losses, each of which is a mean over its own pairs; DDP's averaging
of gradients then gives the gradient of the global mean. All processes must hold the same number of pairs. With
`negatives="local"` a process meets its own texts only and nothing is communicated.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed_amorlip import all_gather, world_size
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
    """Log-partitions of a batch in both directions, `log Z_i` and `log Z_j` (paper Section 3.2; sums, not means).

    Args:
        image_embeds: [N, d], unit norm. text_embeds: [N, d], unit norm; row i belongs to image i.
        logit_scale: scalar s > 0. logit_bias: scalar b or None.
        positive_weight: c >= 0. 1 gives InfoNCE's denominator, 0 the decoupled one (then -inf at N = 1).
        negatives: "local" sums over this process's pairs, "global" over those of all processes.
        gathered_texts: [processes * N, d], what `gather_texts` returned, to save gathering them again.
        tile_size: edge of the largest block of logits held at a time.

    Returns:
        `(log_z_image [N], log_z_text [N])` in nats, float32 (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: the shapes differ, `positive_weight` is negative or `negatives` is unknown.
    """
    tile_size = _check(image_embeds, text_embeds, positive_weight, tile_size)
    image_embeds, text_embeds, gathered_texts = _in_autocast_dtype(image_embeds, text_embeds, gathered_texts)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    columns, offset = _columns(text_embeds, negatives, gathered_texts)
    return LogPartitions.apply(image_embeds, text_embeds, scale, bias, columns, offset, positive_weight, tile_size)


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
    """The encoders' loss given amortized log-partitions (paper Eq. 6).

        L = -2 mean_i l_ii + mean_i exp(log Z_i - log lambda_i) + mean_j exp(log Z_j - log lambda_j)

    With lambda fixed this is a plain sum over pairs, so one pass over tiles yields the value and every gradient. When
    lambda is the batch's own Z, the gradient is twice that of InfoNCE (c = 1) or of the decoupled loss (c = 0).

    Args:
        log_partition_image: log lambda_i [N], in the units of `log_partitions` (a sum over the pairs seen by
            `negatives`). log_partition_text: log lambda_j [N]. No gradient flows into either.
        Others as in `log_partitions`.

    Returns:
        A scalar: the mean over this process's pairs.
    """
    tile_size = _check(image_embeds, text_embeds, positive_weight, tile_size)
    image_embeds, text_embeds, gathered_texts = _in_autocast_dtype(image_embeds, text_embeds, gathered_texts)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    for name, value in (("log_partition_image", log_partition_image), ("log_partition_text", log_partition_text)):
        if value.shape != image_embeds.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(image_embeds)}], got {list(value.shape)}.")
    columns, offset = _columns(text_embeds, negatives, gathered_texts)
    log_image, log_text = (value.detach().to(scale.dtype) for value in (log_partition_image, log_partition_text))
    if columns is not None:
        log_text = all_gather(log_text)
    one = torch.ones_like(scale)
    compute = functools.partial(
        exponential_pass,
        row_shift=log_image,
        column_shift=log_text,
        row_coefficient=one,
        column_coefficient=one,
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
    """SigLIP's loss, every pair a binary question (Zhai et al. 2023, Eq. 1); arguments as in `log_partitions`.

        L = 1/N sum_ij softplus(-l_ij if i = j else l_ij)

    Returns:
        A scalar: the sum over this process's images and the texts they meet, over the number of its images.
    """
    tile_size = _check(image_embeds, text_embeds, 1.0, tile_size)
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
    """How far the amortizer's log-partitions are from their targets.

    With P the conditional whose partition is the target t and Q the one whose partition is lambda, both measures
    P(y) exp(l) / partition, all that a divergence between them sees are their masses p = Z / t and q = Z / lambda, Z
    being the batch estimate. Divergences of measures carry mass terms, which vanish when both are 1 and without which
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
        A scalar, the mean over N, in squared nats (`l2_log`) or nats. Exponentials continue along their tangent above
        `LARGEST_EXPONENT`, so that a head that is far off gets a large finite gradient.
    """
    log_lambda = log_lambda.to(_compute_dtype(log_lambda))
    log_z = log_target if log_z_batch is None else log_z_batch
    if objective == "conjugate":
        return (_exp(log_z - log_lambda) + log_lambda - 1).mean()
    squares = (log_lambda - log_target).square()
    if objective == "l2_log":
        return squares.mean()
    log_p, log_q = log_z - log_target, log_z - log_lambda
    p, q = _exp(log_p), _exp(log_q)
    if objective == "kl":
        divergence = q * (log_q - log_p) - q + p
    elif objective == "kl_sym":
        divergence = (q - p) * (log_q - log_p)
    elif objective == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        divergence = (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    else:
        raise ValueError(f"Unknown amortization objective {objective!r}; choose one of {AMORTIZATION_OBJECTIVES}.")
    return (divergence + regularizer * squares).mean()


def positive_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> Tensor:
    """Logits of the matching pairs, l_ii = s <x_i, y_i> + b, as a tensor [N] of at least float32."""
    dtype = _compute_dtype(image_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = (image_embeds.to(dtype) * text_embeds.to(dtype)).sum(-1) * logit_scale
        return logits if logit_bias is None else logits + logit_bias


def blend_log_targets(log_partition_previous: Tensor, log_z_batch: Tensor, beta: float) -> Tensor:
    """Blended target in log space, log(beta lambda_prev + (1 - beta) Z) (paper Eq. 12); tensors [N], beta in [0, 1)."""
    if beta <= 0:
        return log_z_batch
    return torch.logaddexp(log_partition_previous + math.log(beta), log_z_batch + math.log1p(-beta))


def gather_texts(text_embeds: Tensor, negatives: Negatives) -> Tensor | None:
    """Texts of all processes [processes * N, d] without gradient; None where a process meets its own only."""
    if negatives not in ("local", "global"):
        raise ValueError(f"negatives must be 'local' or 'global', got {negatives!r}.")
    return all_gather(text_embeds) if negatives == "global" and world_size() > 1 else None


def _columns(text_embeds: Tensor, negatives: Negatives, gathered: Tensor | None) -> tuple[Tensor | None, int]:
    """(gathered texts or None, column of this process's first text)."""
    columns = gather_texts(text_embeds, negatives) if gathered is None else gathered
    return columns, 0 if columns is None else dist.get_rank() * len(text_embeds)


def _check(image_embeds: Tensor, text_embeds: Tensor, positive_weight: float, tile_size: int | None) -> int:
    """The tile size; raises ValueError on arguments that cannot be."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "image_embeds and text_embeds must both have shape [N, d], a row a pair; "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    if len(image_embeds) == 0:
        raise ValueError("The batch is empty: image_embeds and text_embeds need at least one pair.")
    if positive_weight < 0:
        raise ValueError(f"positive_weight must be at least 0, got {positive_weight}.")
    if tile_size is None:
        return TILE_SIZE_ON_GPU if image_embeds.is_cuda else TILE_SIZE
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}.")
    return tile_size


def _in_autocast_dtype(*embeds: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, float32 embeddings in its dtype where there are kernels for it; else as they are."""
    device = embeds[0].device
    if not (torch.is_autocast_enabled(device.type) and kernels_run_on(device)):
        return embeds
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(e.to(dtype) if e is not None and e.dtype == torch.float32 else e for e in embeds)


def _exp(value: Tensor) -> Tensor:
    """exp, continued by its tangent above `LARGEST_EXPONENT`."""
    excess = (value - LARGEST_EXPONENT).clamp_min(0)
    return (value - excess).exp() * (1 + excess)


def _compute_dtype(embeds: Tensor) -> torch.dtype:
    return torch.float64 if embeds.dtype == torch.float64 else torch.float32


def _as_scalars(embeds: Tensor, *values: Tensor | float | None) -> tuple[Tensor, ...]:
    """0-dimensional tensors in the computing dtype, made on their device; None becomes 0."""
    dtype = _compute_dtype(embeds)
    return tuple(
        value.to(embeds.device, dtype).reshape(())
        if isinstance(value, Tensor)
        else torch.full((), value or 0.0, dtype=dtype, device=embeds.device)
        for value in values
    )
