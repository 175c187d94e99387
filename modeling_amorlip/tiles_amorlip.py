"""Passes over tiles of the logits l_ij = s <x_i, y_j> + b, and the autograd functions made from them.

Two passes serve every objective. `log_sum_exps` accumulates both directions' log-sum-exps of one reading of the
logits. `exponential_pass` and `sigmoid_pass` turn a tile into the derivatives of a sum over pairs with respect to its
logits, and so into a value and all gradients at once. Neither holds more than one `tile_size` x `tile_size` block, so
memory is O(N d). For half-precision embeddings on a GPU, Triton makes the blocks (`kernels_amorlip`). Rows are this
process's images, columns the texts that they meet; row i's positive is column i + `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels_amorlip as kernels
from .distributed_amorlip import all_gather


HIGHEST = 60.0  # largest exponent taken, so that sums of any length stay below float32's e^88
UNDERFLOW = 87.0  # exp(-UNDERFLOW) is float32's smallest normal number
LOST = 37.0  # terms below exp(-LOST) of what they are added to may be lost

# -- the passes --------------------------------------------------------------------------------------------------------


def log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, positive_weight: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps of the weighted logits in one pass: ([n], [N])."""
    if _has_kernels(rows):
        log_rows, log_columns = kernels.log_sum_exps(rows, columns, scale, offset, _log(positive_weight))
        return log_rows.add_(bias), log_columns.add_(bias)
    log_rows = rows.new_full((len(rows),), -math.inf, dtype=scale.dtype)
    log_columns = rows.new_full((len(columns),), -math.inf, dtype=scale.dtype)
    shift = _common_shift(rows, columns, scale)
    for r in _tiles(rows, tile_size):
        for c in _tiles(columns, tile_size):
            logits = _logits(rows[r], columns[c], scale)
            _weigh_positives(logits, r, c, offset, positive_weight)
            tile_rows, tile_columns = _tile_log_sum_exps(logits, shift)
            log_rows[r] = torch.logaddexp(log_rows[r], tile_rows)
            log_columns[c] = torch.logaddexp(log_columns[c], tile_columns)
    return log_rows.add_(bias), log_columns.add_(bias)


def exponential_pass(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    row_shift: Tensor,
    column_shift: Tensor,
    row_coefficient: Tensor,
    column_coefficient: Tensor,
    positive_weight: float,
    tile_size: int,
    pull: float = 0.0,
) -> tuple[Tensor, ...]:
    """Sum of w_ij = m_ij (u_i exp(l_ij - a_i) + v_j exp(l_ij - b_j)), less `pull` times the positive logits.

    m is `positive_weight` on the diagonal and 1 elsewhere, a and b are the shifts, u and v the coefficients ([n] and
    [N], or []). Gradients come at once, since dw/dl = w. Returns what `_gradients` does.
    """
    a, b = row_shift - bias, column_shift - bias
    u, v = row_coefficient.expand(len(rows)), column_coefficient.expand(len(columns))
    plain = a, b, u, v
    fused, common = _has_kernels(rows), _common_shift(rows, columns, scale)
    # One exponential a pair instead of two: w = exp(l - k) (u exp(k - a) + v exp(k - b)). What underflows in the first
    # factor is then below exp(-LOST), whatever the second.
    one_exponential = common is not None and torch.minimum(a.min(), b.min()) > common + LOST - UNDERFLOW
    if one_exponential:
        u, v = u * (common - a).exp(), v * (common - b).exp()

    def negative_weights(r: slice, c: slice) -> tuple[Tensor, Tensor]:
        if fused:
            shift = offset + r.start - c.start
            return kernels.exponential_weights(rows[r], columns[c], scale, a[r], b[c], u[r], v[c], shift)
        logits = _logits(rows[r], columns[c], scale)
        if one_exponential:
            weights = (logits.sub_(common) if common else logits).exp_().mul_(u[r, None] + v[c])
        else:
            weights = (logits - a[r, None]).exp_().mul_(u[r, None])
            weights.add_(logits.sub_(b[c]).exp_().mul_(v[c]))
        if (diagonal := _diagonal(weights, r, c, offset)) is not None:
            diagonal.zero_()
        return weights, weights.sum()

    def weigh(r: slice, c: slice) -> Tile:
        weights, total = negative_weights(r, c)
        i = slice(max(r.start, c.start - offset), min(r.stop, c.stop - offset))
        if i.start >= i.stop:
            return Tile(total, total, weights)
        # A positive's weight and the pull all but cancel: in float64, since a logit of 100 rounded to float32 is
        # off by 4e-6.
        j = slice(i.start + offset, i.stop + offset)
        logit = (rows[i].double() * columns[j].double()).sum(1) * scale.double()
        p, q, f, g = (value[k].double() for value, k in zip(plain, (i, j, i, j), strict=True))
        log_weight = _log(positive_weight)
        positives = f * (logit + log_weight - p).exp() + g * (logit + log_weight - q).exp()
        slopes = (positives - pull).to(scale.dtype)
        value = total + (positives - pull * (logit + bias)).sum().to(total.dtype)
        return Tile(value, total + slopes.sum(), weights, (i, j, slopes))

    return _gradients(rows, columns, scale, tile_size, weigh)


def sigmoid_pass(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, tile_size: int
) -> tuple[Tensor, ...]:
    """Sum of softplus(z_ij), z = -l on the diagonal and l elsewhere. Returns what `_gradients` does."""

    def weigh(r: slice, c: slice) -> Tile:
        logits = _logits(rows[r], columns[c], scale).add_(bias)
        diagonal = _diagonal(logits, r, c, offset)
        if diagonal is not None:
            diagonal.neg_()
        value = torch.nn.functional.softplus(logits).sum()
        logits.sigmoid_()
        if diagonal is not None:
            diagonal.neg_()
        return Tile(value, logits.sum(), logits)

    return _gradients(rows, columns, scale, tile_size, weigh)


class Tile(NamedTuple):
    """A tile's part of a sum over pairs, and the derivatives of that part by its logits."""

    value: Tensor
    slope: Tensor  # sum of all derivatives
    weights: Tensor  # the derivatives [rows, columns], 0 where `positives` has them
    positives: tuple[slice, slice, Tensor] | None = (
        None  # rows, columns and derivatives that are too fine for `weights`
    )


def _gradients(
    rows: Tensor, columns: Tensor, scale: Tensor, tile_size: int, weigh: Callable[[slice, slice], Tile]
) -> tuple[Tensor, ...]:
    """Value and gradients of a sum over pairs, given what `weigh` makes of a tile.

    Returns:
        (value [], bias gradient sum w [], scale gradient sum w <x, y> [], row gradients s W y [n, d], column gradients
        s W^T x [N, d]).
    """
    row_grad, column_grad = (torch.zeros_like(side, dtype=scale.dtype) for side in (rows, columns))
    value, bias_grad, scale_grad = (scale.new_zeros(()) for _ in range(3))
    for r in _tiles(rows, tile_size):
        for c in _tiles(columns, tile_size):
            tile = weigh(r, c)
            value += tile.value
            bias_grad += tile.slope
            _add_product(row_grad[r], tile.weights, columns[c])
            _add_product(column_grad[c], tile.weights.T, rows[r])
            if tile.positives is not None:
                i, j, slopes = tile.positives
                row_grad[i].addcmul_(slopes[:, None], columns[j].to(scale.dtype))
                column_grad[j].addcmul_(slopes[:, None], rows[i].to(scale.dtype))
        scale_grad += (row_grad[r] * rows[r]).sum()
    return value, bias_grad, scale_grad, row_grad.mul_(scale), column_grad.mul_(scale)


def _add_product(total: Tensor, weights: Tensor, embeds: Tensor) -> None:
    """total += weights @ embeds in the weights' dtype, accumulated over tiles in that of `total`."""
    if weights.dtype == total.dtype:
        total.addmm_(weights, embeds.to(total.dtype))
    else:
        total += weights @ embeds.to(weights.dtype)


def _has_kernels(embeds: Tensor) -> bool:
    return embeds.dtype in kernels.HALF_PRECISION and kernels.kernels_run_on(embeds.device)


def _tiles(embeds: Tensor, tile_size: int) -> Iterator[slice]:
    """Slices of at most `tile_size` rows."""
    for start in range(0, len(embeds), tile_size):
        yield slice(start, min(start + tile_size, len(embeds)))


def _logits(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """A tile's logits without bias, in the computing dtype."""
    return (rows.to(scale.dtype) * scale) @ columns.to(scale.dtype).T


def _diagonal(tile: Tensor, r: slice, c: slice, offset: int) -> Tensor | None:
    """A view of the positives in a tile, or None when there are none."""
    k = r.start + offset - c.start
    return tile.diagonal(k) if -tile.shape[0] < k < tile.shape[1] else None


def _weigh_positives(logits: Tensor, r: slice, c: slice, offset: int, positive_weight: float) -> None:
    """Adds log c to the positives of a tile; before the exponential, or a large one would overflow first."""
    if positive_weight != 1 and (diagonal := _diagonal(logits, r, c, offset)) is not None:
        diagonal += _log(positive_weight)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _common_shift(rows: Tensor, columns: Tensor, scale: Tensor) -> float | None:
    """A number k such that no exp(l - k) overflows and few underflow.

    None on a GPU, where reading it would wait, and for kernels, which do without.
    """
    if rows.is_cuda or _has_kernels(rows):
        return None
    largest = scale * rows.norm(dim=1).max() * columns.norm(dim=1).max()  # no logit is larger (Cauchy-Schwarz)
    return max(0.0, float(largest) - HIGHEST)


def _tile_log_sum_exps(logits: Tensor, shift: float | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of a tile by rows and by columns, from one exponential where all sums stay normal numbers."""
    if shift is not None:
        exponentials = torch.sub(logits, shift).exp_() if shift else logits.exp()
        sums = exponentials.sum(1), exponentials.sum(0)
        if min(sums[0].min(), sums[1].min()) > math.exp(LOST - UNDERFLOW):
            return sums[0].log_().add_(shift), sums[1].log_().add_(shift)
    return logits.logsumexp(1), logits.logsumexp(0)


# -- autograd ----------------------------------------------------------------------------------------------------------


class LogPartitions(torch.autograd.Function):
    """(rows, own texts, scale, bias, gathered texts or None, ...) -> both directions' log-partitions, own pairs."""

    @staticmethod
    def forward(ctx, rows, texts, scale, bias, columns, offset, positive_weight, tile_size):
        gathered = columns is not None
        columns = columns if gathered else texts
        with torch.autocast(rows.device.type, enabled=False):
            log_rows, log_columns = log_sum_exps(rows, columns, scale, bias, offset, positive_weight, tile_size)
        own = log_columns
        if gathered:
            log_columns = all_gather(log_columns[None]).logsumexp(0)
            own = log_columns[offset : offset + len(texts)].clone()
        ctx.save_for_backward(rows, columns, scale, bias, log_rows, log_columns)
        ctx.constants = (gathered, offset, positive_weight, tile_size)
        return log_rows, own

    @staticmethod
    def backward(ctx, row_upstream, column_upstream):
        rows, columns, scale, bias, log_rows, log_columns = ctx.saved_tensors
        gathered, offset, positive_weight, tile_size = ctx.constants
        if gathered:
            column_upstream = all_gather(column_upstream)
        with torch.autocast(rows.device.type, enabled=False):
            _, bias_grad, scale_grad, row_grad, column_grad = exponential_pass(
                rows,
                columns,
                scale,
                bias,
                offset,
                log_rows,
                log_columns,
                row_upstream,
                column_upstream,
                positive_weight,
                tile_size,
            )
        column_grad = _reduce_to_own(column_grad, offset, len(rows), gathered)
        return row_grad.to(rows.dtype), column_grad.to(columns.dtype), scale_grad, bias_grad, *[None] * 4


class PairSum(torch.autograd.Function):
    """A pass's value, with the gradients that the same pass gave; the mean over the own pairs."""

    @staticmethod
    def forward(ctx, rows, texts, scale, bias, columns, offset, compute):
        gathered = columns is not None
        with torch.autocast(rows.device.type, enabled=False):
            value, bias_grad, scale_grad, row_grad, column_grad = compute(
                rows, columns if gathered else texts, scale, bias, offset
            )
        # Reduced here, not in backward: every process passes here in the same order, whatever autograd does later.
        column_grad = _reduce_to_own(column_grad, offset, len(rows), gathered)
        ctx.save_for_backward(row_grad, column_grad, scale_grad, bias_grad)
        ctx.pairs, ctx.dtypes = len(rows), (rows.dtype, texts.dtype, scale.dtype, bias.dtype)
        return value / len(rows)

    @staticmethod
    def backward(ctx, upstream):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((gradient * (upstream / ctx.pairs)).to(dtype) for gradient, dtype in gradients), None, None, None


# -- processes ---------------------------------------------------------------------------------------------------------


def _reduce_to_own(gradient: Tensor, offset: int, length: int, gathered: bool) -> Tensor:
    """Sums the gradients of gathered texts over all processes and keeps those of this process's own."""
    if not gathered:
        return gradient
    dist.all_reduce(gradient)
    return gradient[offset : offset + length]
