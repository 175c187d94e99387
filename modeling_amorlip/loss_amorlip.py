"""The mathematics of AmorLIP: pure functions on embeddings, streamed over tiles, in log space.

Notation (paper symbol in brackets): `image_embeds` [x] and `text_embeds` [y] are N x d, `logit_scale` [s = 1/tau] is
the scale itself (not its logarithm), `logit_bias` [b], and the logits are l_ij = s <x_i, y_j> + b. The positive pairs
lie on the diagonal and enter a partition sum with the weight `positive_weight` [c]:

    Z_i = sum_{j != i} exp(l_ij) + c exp(l_ii)            (over texts, for image i)
    Z_j = sum_{i != j} exp(l_ij) + c exp(l_jj)            (over images, for text j)

Everything here is made from two passes over tiles of the logits: one accumulates both directions' log-sum-exps, the
other turns the pair weights w_ij = u_i exp(l_ij - a_i) + v_j exp(l_ij - b_j) into a value and all gradients at once.
Neither holds more than one `tile_size` x `tile_size` block, so the memory is O(N d).

With `negatives="global"` the texts of all processes are gathered once, and each process does its rows of the global
matrix. As with `torch.distributed.nn.all_gather`, gradients are those of the *sum* of all processes' losses, each of
which is a mean over its own pairs; DDP's averaging of gradients then gives the gradient of the global mean. All
processes must hold the same number of pairs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


Negatives = Literal["local", "global"]
DEFAULT_TILE_SIZE = 1024
AMORTIZATION_OBJECTIVES = ("l2_log", "conjugate")


def log_partitions(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    positive_weight: float = 1e-3,
    negatives: Negatives = "local",
    tile_size: int = DEFAULT_TILE_SIZE,
) -> tuple[Tensor, Tensor]:
    """Log-partitions of a batch in both directions, `log Z_i` and `log Z_j` (paper Section 3.2; sums, not means).

    Args:
        image_embeds: [N, d], unit norm. text_embeds: [N, d], unit norm; row i belongs to image i.
        logit_scale: scalar s > 0. logit_bias: scalar b or None.
        positive_weight: c >= 0. 1 gives InfoNCE's denominator, 0 the decoupled one (then -inf at N = 1).
        negatives: "local" sums over this process's pairs, "global" over those of all processes.
        tile_size: edge of the largest block of logits held at a time.

    Returns:
        `(log_z_image [N], log_z_text [N])` in nats, float32 (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: the shapes differ, `positive_weight` is negative or `negatives` is unknown.
    """
    columns, offset, group_size = _prepare(image_embeds, text_embeds, positive_weight, negatives, tile_size)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    return _LogPartitions.apply(
        image_embeds, text_embeds, scale, bias, columns, offset, group_size, positive_weight, tile_size
    )


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
    tile_size: int = DEFAULT_TILE_SIZE,
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
    columns, offset, _ = _prepare(image_embeds, text_embeds, positive_weight, negatives, tile_size)
    scale, bias = _as_scalars(image_embeds, logit_scale, logit_bias)
    for name, value in (("log_partition_image", log_partition_image), ("log_partition_text", log_partition_text)):
        if value.shape != image_embeds.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(image_embeds)}], got {list(value.shape)}.")
    log_text = log_partition_text.detach().to(scale.dtype)
    if columns is not None:
        log_text = _all_gather(log_text)
    partition_term = _PairSum.apply(
        image_embeds, text_embeds, scale, bias, columns, offset,
        log_partition_image.detach().to(scale.dtype), log_text, positive_weight, tile_size,
    )  # fmt: skip
    return partition_term - 2 * positive_logits(image_embeds, text_embeds, scale, bias).mean()


def amortization_loss(
    log_lambda: Tensor, log_target: Tensor, *, objective: str = "l2_log", log_z_batch: Tensor | None = None
) -> Tensor:
    """How far the amortizer's log-partitions are from their targets.

    Args:
        log_lambda: log lambda [N], the head's prediction. log_target: log t [N], the blended target (Eq. 12).
        objective: `"l2_log"`, mean (log lambda - log t)^2 (Eq. 10); or `"conjugate"`, mean of exp(log Z - h) + h - 1
            with h = log lambda and Z the batch estimate, which is linear in Z and so unbiased (NeuCLIP's duality).
        log_z_batch: log Z [N], needed by `"conjugate"` only; `log_target` stands in when it is None.

    Returns:
        A scalar in squared nats (`l2_log`) or nats (`conjugate`).
    """
    log_lambda = log_lambda.to(_compute_dtype(log_lambda))
    if objective == "l2_log":
        return (log_lambda - log_target).square().mean()
    if objective == "conjugate":
        log_z = log_target if log_z_batch is None else log_z_batch
        return ((log_z - log_lambda).exp() + log_lambda - 1).mean()
    raise ValueError(f"Unknown amortization objective {objective!r}; choose one of {AMORTIZATION_OBJECTIVES}.")


def positive_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> Tensor:
    """Logits of the matching pairs, l_ii = s <x_i, y_i> + b, as a tensor [N] of at least float32."""
    dtype = _compute_dtype(image_embeds)
    logits = (image_embeds.to(dtype) * text_embeds.to(dtype)).sum(-1) * logit_scale
    return logits if logit_bias is None else logits + logit_bias


def blend_log_targets(log_partition_previous: Tensor, log_z_batch: Tensor, beta: float) -> Tensor:
    """Blended target in log space, log(beta lambda_prev + (1 - beta) Z) (paper Eq. 12); tensors [N], beta in [0, 1)."""
    if beta <= 0:
        return log_z_batch
    return torch.logaddexp(log_partition_previous + math.log(beta), log_z_batch + math.log1p(-beta))


# -- the two passes over tiles -----------------------------------------------------------------------------------------


def _log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, positive_weight: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps of the weighted logits in one pass: ([n], [N])."""
    dtype = scale.dtype
    log_rows = rows.new_full((len(rows),), -math.inf, dtype=dtype)
    log_columns = rows.new_full((len(columns),), -math.inf, dtype=dtype)
    log_weight = math.log(positive_weight) if positive_weight > 0 else -math.inf
    for r, row_tile in _tiles(rows, scale, tile_size):
        for c, logits in _logit_tiles(row_tile, columns, bias, tile_size):
            if (diagonal := _diagonal(logits, r, c, offset)) is not None:
                diagonal += log_weight
            log_rows[r] = torch.logaddexp(log_rows[r], torch.logsumexp(logits, dim=1))
            log_columns[c] = torch.logaddexp(log_columns[c], torch.logsumexp(logits, dim=0))
    return log_rows, log_columns


def _pair_pass(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    row_shift: Tensor,
    column_shift: Tensor,
    row_coefficient: Tensor | float,
    column_coefficient: Tensor | float,
    positive_weight: float,
    tile_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of pair weights w_ij and its gradients in one pass.

    w_ij = m_ij (u_i exp(l_ij - a_i) + v_j exp(l_ij - b_j)), m = c on the diagonal and 1 elsewhere, where a, b are the
    shifts and u, v the coefficients. Since dw/dl = w, the gradients are s W y, s W^T x, sum w (l - b) / s and sum w.

    Returns:
        (value and bias gradient [], scale gradient [], row gradients [n, d], column gradients [N, d]).
    """
    dtype = scale.dtype
    row_grad = torch.zeros_like(rows, dtype=dtype)
    column_grad = torch.zeros_like(columns, dtype=dtype)
    total, scale_grad = scale.new_zeros(()), scale.new_zeros(())
    for r, row_tile in _tiles(rows, scale, tile_size):
        a, u = row_shift[r, None], _rows_of(row_coefficient, r)
        for c, logits in _logit_tiles(row_tile, columns, bias, tile_size):
            weights = (logits - a).exp_().mul_(u)
            weights += (logits - column_shift[c]).exp_().mul_(_columns_of(column_coefficient, c))
            if (diagonal := _diagonal(weights, r, c, offset)) is not None:
                diagonal *= positive_weight
            column_tile = columns[c].to(dtype)
            row_grad[r].addmm_(weights, column_tile)
            column_grad[c].addmm_(weights.T, row_tile)  # row_tile carries the scale already
            total += weights.sum()
        scale_grad += (row_grad[r] * rows[r]).sum()
    return total, scale_grad, row_grad.mul_(scale), column_grad


def _tiles(rows: Tensor, scale: Tensor, tile_size: int):
    """Yields (slice, scaled rows in the computing dtype)."""
    for start in range(0, len(rows), tile_size):
        r = slice(start, min(start + tile_size, len(rows)))
        yield r, rows[r].to(scale.dtype) * scale


def _logit_tiles(row_tile: Tensor, columns: Tensor, bias: Tensor, tile_size: int):
    """Yields (column slice, logits [tile, tile])."""
    for start in range(0, len(columns), tile_size):
        c = slice(start, min(start + tile_size, len(columns)))
        yield c, torch.addmm(bias, row_tile, columns[c].to(row_tile.dtype).T)


def _diagonal(tile: Tensor, r: slice, c: slice, offset: int) -> Tensor | None:
    """A view of the positives in a tile (row i's positive is column i + offset), or None when there are none."""
    k = r.start + offset - c.start
    return tile.diagonal(k) if -tile.shape[0] < k < tile.shape[1] else None


def _rows_of(coefficient: Tensor | float, r: slice) -> Tensor | float:
    return coefficient[r, None] if isinstance(coefficient, Tensor) else coefficient


def _columns_of(coefficient: Tensor | float, c: slice) -> Tensor | float:
    return coefficient[c] if isinstance(coefficient, Tensor) else coefficient


# -- autograd ----------------------------------------------------------------------------------------------------------


class _LogPartitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, texts, scale, bias, columns, offset, group_size, positive_weight, tile_size):
        columns = texts if columns is None else columns
        with torch.autocast(rows.device.type, enabled=False):
            log_rows, log_columns = _log_sum_exps(rows, columns, scale, bias, offset, positive_weight, tile_size)
        log_columns_own = log_columns
        if group_size > 1:
            log_columns = _all_gather(log_columns[None]).logsumexp(0)
            log_columns_own = log_columns[offset : offset + len(texts)].clone()
        ctx.save_for_backward(rows, columns, scale, bias, log_rows, log_columns)
        ctx.constants = (offset, group_size, positive_weight, tile_size)
        return log_rows, log_columns_own

    @staticmethod
    def backward(ctx, row_upstream, column_upstream):
        rows, columns, scale, bias, log_rows, log_columns = ctx.saved_tensors
        offset, group_size, positive_weight, tile_size = ctx.constants
        if group_size > 1:
            column_upstream = _all_gather(column_upstream.contiguous())
        with torch.autocast(rows.device.type, enabled=False):
            bias_grad, scale_grad, row_grad, column_grad = _pair_pass(
                rows, columns, scale, bias, offset, log_rows, log_columns,
                row_upstream, column_upstream, positive_weight, tile_size,
            )  # fmt: skip
        column_grad = _reduce_to_own(column_grad, offset, len(rows), group_size)
        return row_grad.to(rows.dtype), column_grad.to(columns.dtype), scale_grad, bias_grad, *[None] * 5


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, texts, scale, bias, columns, offset, row_shift, column_shift, positive_weight, tile_size):
        group_size = 1 if columns is None else len(columns) // len(texts)
        columns = texts if columns is None else columns
        coefficient = 1 / len(rows)
        with torch.autocast(rows.device.type, enabled=False):
            total, scale_grad, row_grad, column_grad = _pair_pass(
                rows, columns, scale, bias, offset, row_shift, column_shift,
                coefficient, coefficient, positive_weight, tile_size,
            )  # fmt: skip
        # Reduced here, not in backward: every process passes here in the same order, whatever autograd does later.
        column_grad = _reduce_to_own(column_grad, offset, len(rows), group_size)
        ctx.save_for_backward(row_grad.to(rows.dtype), column_grad.to(texts.dtype), scale_grad, total)
        return total.clone()

    @staticmethod
    def backward(ctx, upstream):
        gradients = (upstream.to(g.dtype) * g for g in ctx.saved_tensors)
        return *gradients, *[None] * 6


def _prepare(image_embeds, text_embeds, positive_weight, negatives, tile_size) -> tuple[Tensor | None, int, int]:
    """Checks the arguments; returns (gathered texts or None, offset of this process's pairs, number of processes)."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "image_embeds and text_embeds must both have shape [N, d], a row a pair; "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    if len(image_embeds) == 0:
        raise ValueError("The batch is empty: image_embeds and text_embeds need at least one pair.")
    if positive_weight < 0:
        raise ValueError(f"positive_weight must be at least 0, got {positive_weight}.")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}.")
    if negatives not in ("local", "global"):
        raise ValueError(f"negatives must be 'local' or 'global', got {negatives!r}.")
    group_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if negatives == "local" or group_size == 1:
        return None, 0, 1
    return _all_gather(text_embeds.detach()), dist.get_rank() * len(text_embeds), group_size


def _compute_dtype(embeds: Tensor) -> torch.dtype:
    return torch.float64 if embeds.dtype == torch.float64 else torch.float32


def _as_scalars(embeds: Tensor, *values: Tensor | float | None) -> tuple[Tensor, ...]:
    """0-dimensional tensors in the computing dtype; None becomes 0."""
    dtype = _compute_dtype(embeds)
    return tuple(
        torch.as_tensor(0.0 if value is None else value, dtype=dtype, device=embeds.device).reshape(())
        for value in values
    )


def _all_gather(tensor: Tensor) -> Tensor:
    """Concatenates equally shaped tensors of all processes along the first dimension, in order of rank."""
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def _reduce_to_own(gradient: Tensor, offset: int, length: int, group_size: int) -> Tensor:
    """Sums the gradients of the gathered texts over all processes and keeps those of this process's own."""
    if group_size == 1:
        return gradient
    dist.all_reduce(gradient)
    return gradient[offset : offset + length]
