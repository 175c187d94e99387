"""Passes over tiles of the logits l_ij = s <x_i, y_j> + b, and the autograd functions made from them.

Two passes serve every objective. `log_sum_exps` accumulates both directions' log-sum-exps of one reading of the
logits. `exponential_pass` and `sigmoid_pass` turn a tile into the derivatives of a sum over pairs with respect to its
logits, and so into a value and all gradients at once. Neither holds more than one `tile_size` x `tile_size` block, so
memory is O(N d). Rows are this process's images, columns the texts that they meet; row i's positive is column
i + `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


HIGHEST = 60.0  # largest exponent taken, so that sums of any length stay below float32's e^88
UNDERFLOW = 87.0  # exp(-UNDERFLOW) is float32's smallest normal number
LOST = 37.0  # terms below exp(-LOST) of what they are added to may be lost

# -- the passes --------------------------------------------------------------------------------------------------------


def log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, positive_weight: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps of the weighted logits in one pass: ([n], [N])."""
    log_rows = rows.new_full((len(rows),), -math.inf, dtype=scale.dtype)
    log_columns = rows.new_full((len(columns),), -math.inf, dtype=scale.dtype)
    shift = _common_shift(rows, columns, scale)
    for r, row_tile in _tiles(rows, scale, tile_size):
        for c, logits in _logit_tiles(row_tile, columns, tile_size):
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
    log_weight = math.log(positive_weight) if positive_weight > 0 else -math.inf
    plain = a, b, u, v
    common = _common_shift(rows, columns, scale)
    # One exponential a pair instead of two: w = exp(l - k) (u exp(k - a) + v exp(k - b)). What underflows in the first
    # factor is then below exp(-LOST), whatever the second.
    if common is not None and torch.minimum(a.min(), b.min()) > common + LOST - UNDERFLOW:
        u, v = u * (common - a).exp(), v * (common - b).exp()

        def weights_of(logits: Tensor, r: slice, c: slice) -> Tensor:
            return (logits.sub_(common) if common else logits).exp_().mul_(u[r, None] + v[c])
    else:

        def weights_of(logits: Tensor, r: slice, c: slice) -> Tensor:
            weights = (logits - a[r, None]).exp_().mul_(u[r, None])
            return weights.add_(logits.sub_(b[c]).exp_().mul_(v[c]))

    def weigh(logits: Tensor, r: slice, c: slice) -> tuple[Tensor, Tensor, Tensor]:
        weights = weights_of(logits, r, c)
        if (diagonal := _diagonal(weights, r, c, offset)) is not None:
            # A positive's weight and the pull all but cancel: in float64, since a logit of 100 rounded to float32 is
            # off by 4e-6.
            i = slice(max(r.start, c.start - offset), min(r.stop, c.stop - offset))
            j = slice(i.start + offset, i.stop + offset)
            logit = (rows[i].double() * columns[j].double()).sum(1) * scale.double()
            a, b, u, v = (value[k].double() for value, k in zip(plain, (i, j, i, j), strict=True))
            positives = u * (logit + log_weight - a).exp() + v * (logit + log_weight - b).exp()
            diagonal.copy_(positives - pull)
            slope = weights.sum()
            return slope + pull * (1 - logit - bias).sum().to(slope.dtype), slope, weights
        value = weights.sum()
        return value, value, weights

    return _gradients(rows, columns, scale, tile_size, weigh)


def sigmoid_pass(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, tile_size: int
) -> tuple[Tensor, ...]:
    """Sum of softplus(z_ij), z = -l on the diagonal and l elsewhere. Returns what `_gradients` does."""

    def weigh(logits: Tensor, r: slice, c: slice) -> tuple[Tensor, Tensor, Tensor]:
        diagonal = _diagonal(logits.add_(bias), r, c, offset)
        if diagonal is not None:
            diagonal.neg_()
        value = torch.nn.functional.softplus(logits).sum()
        logits.sigmoid_()
        if diagonal is not None:
            diagonal.neg_()
        return value, logits.sum(), logits

    return _gradients(rows, columns, scale, tile_size, weigh)


def _gradients(rows: Tensor, columns: Tensor, scale: Tensor, tile_size: int, weigh: Callable) -> tuple[Tensor, ...]:
    """Value and gradients of a sum over pairs, given what `weigh` makes of a tile of logits s <x, y>.

    `weigh` returns the tile's value, the sum of its derivatives w by the logits, and the w themselves.

    Returns:
        (value [], bias gradient sum w [], scale gradient sum w <x, y> [], row gradients s W y [n, d], column gradients
        s W^T x [N, d]).
    """
    row_grad, column_grad = (torch.zeros_like(side, dtype=scale.dtype) for side in (rows, columns))
    value, bias_grad, scale_grad = (scale.new_zeros(()) for _ in range(3))
    for r, row_tile in _tiles(rows, scale, tile_size):
        for c, logits in _logit_tiles(row_tile, columns, tile_size):
            tile_value, tile_slope, weights = weigh(logits, r, c)
            value += tile_value
            bias_grad += tile_slope
            row_grad[r].addmm_(weights, columns[c].to(scale.dtype))
            column_grad[c].addmm_(weights.T, row_tile)  # row_tile carries the scale already
        scale_grad += (row_grad[r] * rows[r]).sum()
    return value, bias_grad, scale_grad, row_grad.mul_(scale), column_grad


def _tiles(rows: Tensor, scale: Tensor, tile_size: int):
    """Yields (slice, scaled rows in the computing dtype)."""
    for start in range(0, len(rows), tile_size):
        r = slice(start, min(start + tile_size, len(rows)))
        yield r, rows[r].to(scale.dtype) * scale


def _logit_tiles(row_tile: Tensor, columns: Tensor, tile_size: int):
    """Yields (column slice, logits without bias [tile, tile])."""
    for start in range(0, len(columns), tile_size):
        c = slice(start, min(start + tile_size, len(columns)))
        yield c, row_tile @ columns[c].to(row_tile.dtype).T


def _diagonal(tile: Tensor, r: slice, c: slice, offset: int) -> Tensor | None:
    """A view of the positives in a tile, or None when there are none."""
    k = r.start + offset - c.start
    return tile.diagonal(k) if -tile.shape[0] < k < tile.shape[1] else None


def _weigh_positives(logits: Tensor, r: slice, c: slice, offset: int, positive_weight: float) -> None:
    """Adds log c to the positives of a tile; before the exponential, or a large one would overflow first."""
    if positive_weight != 1 and (diagonal := _diagonal(logits, r, c, offset)) is not None:
        diagonal += math.log(positive_weight) if positive_weight > 0 else -math.inf


def _common_shift(rows: Tensor, columns: Tensor, scale: Tensor) -> float | None:
    """A number k such that no exp(l - k) overflows and few underflow; None on a GPU, where reading it would wait."""
    if rows.is_cuda:
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
                rows, columns, scale, bias, offset, log_rows, log_columns,
                row_upstream, column_upstream, positive_weight, tile_size,
            )  # fmt: skip
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


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates equally shaped tensors of all processes along the first dimension, in order of rank."""
    tensor = tensor.detach().contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reduce_to_own(gradient: Tensor, offset: int, length: int, gathered: bool) -> Tensor:
    """Sums the gradients of gathered texts over all processes and keeps those of this process's own."""
    if not gathered:
        return gradient
    dist.all_reduce(gradient)
    return gradient[offset : offset + length]
