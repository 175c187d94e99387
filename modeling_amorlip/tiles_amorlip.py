"""Passes over tiles of the logits l_ij = s <x_i, y_j> + b, and the autograd functions made from them.

Two kinds of pass serve every objective. `log_sum_exps` accumulates the log-sum-exps of both directions in one reading
of the logits. `exponential_pass` and `sigmoid_pass` turn a tile into the derivatives of a sum over pairs with
respect to its logits, and so into a value and all gradients at once. None holds more than one tile of logits, so
memory is O(N d). For half-precision embeddings on a GPU, Triton computes the blocks (`kernels_amorlip`). Rows are this
rank's images, columns the texts that they are compared with; the positive of row i is column i + `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels_amorlip as kernels
from .distributed_amorlip import all_gather, sum_own_rows


MAX_EXPONENT = 60.0  # of exponentials taken as they are, so that sums of any length stay below float32's e^88
UNDERFLOW = 87.0  # exp(-UNDERFLOW) is float32's smallest normal number
NEGLIGIBLE = 37.0  # terms below exp(-NEGLIGIBLE) times what they are added to may be lost

# -- the passes --------------------------------------------------------------------------------------------------------


class PassResult(NamedTuple):
    """Value and gradients of a sum over pairs, all in the computing dtype."""

    value: Tensor  # []
    bias_grad: Tensor  # [], the sum of all derivatives w
    scale_grad: Tensor  # [], the sum of w <x, y>
    row_grad: Tensor  # [n, d], s W y
    column_grad: Tensor  # [N, d], s W^T x


class Tile(NamedTuple):
    """A tile's part of a sum over pairs, and the derivatives of that part with respect to its logits."""

    value: Tensor
    slope: Tensor  # sum of all derivatives
    weights: Tensor  # the derivatives [rows, columns], 0 where `positives` holds them
    # Rows, columns and derivatives of the positives, which need more precision than `weights` has.
    positives: tuple[slice, slice, Tensor] | None = None


def log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, positive_weight: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """Return row and column log-sum-exps of the weighted logits, ([n], [N]), from one pass."""
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
) -> PassResult:
    """Sum w_ij over all pairs, less `pull` times the positive logits.

    w_ij = m_ij (u_i exp(l_ij - a_i) + v_j exp(l_ij - b_j)), where m is `positive_weight` on the diagonal and 1
    elsewhere, a and b are the shifts, and u and v the coefficients ([n] and [N], or []). The gradients come from the
    same pass, since dw/dl = w.
    """
    weigh = _ExponentialWeights(
        rows,
        columns,
        scale,
        bias,
        offset,
        shifts=(row_shift - bias, column_shift - bias),
        coefficients=(row_coefficient.expand(len(rows)), column_coefficient.expand(len(columns))),
        positive_weight=positive_weight,
        pull=pull,
    )
    return _accumulate(rows, columns, scale, tile_size, weigh)


class _ExponentialWeights:
    """The derivatives of `exponential_pass`'s sum with respect to the logits, tile by tile."""

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        *,
        shifts: tuple[Tensor, Tensor],
        coefficients: tuple[Tensor, Tensor],
        positive_weight: float,
        pull: float,
    ):
        self.rows, self.columns, self.scale, self.bias, self.offset = rows, columns, scale, bias, offset
        self.a, self.b = shifts
        self.u, self.v = self.factors = coefficients
        self.log_weight, self.pull = _log(positive_weight), pull
        self.fused = _has_kernels(rows)
        common = _common_shift(rows, columns, scale)
        # One exponential per pair instead of two: w = exp(l - k) (u exp(k - a) + v exp(k - b)). Whatever underflows in
        # the first factor is then below exp(-NEGLIGIBLE), however large the second.
        self.common: float | None = None
        if common is not None and torch.minimum(self.a.min(), self.b.min()) > common + NEGLIGIBLE - UNDERFLOW:
            self.common = common
            self.factors = self.u * (common - self.a).exp(), self.v * (common - self.b).exp()

    def __call__(self, r: slice, c: slice) -> Tile:
        weights, total = self._negatives(r, c)
        i = slice(max(r.start, c.start - self.offset), min(r.stop, c.stop - self.offset))
        if i.start >= i.stop:
            return Tile(total, total, weights)
        j = slice(i.start + self.offset, i.stop + self.offset)
        positive_value, slopes = self._positives(i, j)
        return Tile(total + positive_value.to(total.dtype), total + slopes.sum(), weights, (i, j, slopes))

    def _negatives(self, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """Return the weights of a tile, 0 for its positives, and their sum."""
        u, v = self.factors[0][r], self.factors[1][c]
        if self.fused:
            shift = self.offset + r.start - c.start
            rows, columns = self.rows[r], self.columns[c]
            return kernels.exponential_weights(rows, columns, self.scale, self.a[r], self.b[c], u, v, shift)
        logits = _logits(self.rows[r], self.columns[c], self.scale)
        if self.common is not None:
            weights = (logits.sub_(self.common) if self.common else logits).exp_().mul_(u[:, None] + v)
        else:
            weights = (logits - self.a[r, None]).exp_().mul_(u[:, None])
            weights.add_(logits.sub_(self.b[c]).exp_().mul_(v))
        if (diagonal := _diagonal(weights, r, c, self.offset)) is not None:
            diagonal.zero_()
        return weights, weights.sum()

    def _positives(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """Return the positive pairs' part of the sum and their derivatives."""
        # A positive's weight and the pull all but cancel, and a logit of 100 is rounded to 4e-6 in float32: so float64.
        logit = (self.rows[i].double() * self.columns[j].double()).sum(1) * self.scale.double()
        a, b, u, v = (x.double() for x in (self.a[i], self.b[j], self.u[i], self.v[j]))
        weights = u * (logit + self.log_weight - a).exp() + v * (logit + self.log_weight - b).exp()
        value = (weights - self.pull * (logit + self.bias)).sum()
        return value, (weights - self.pull).to(self.scale.dtype)


def sigmoid_pass(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, tile_size: int) -> PassResult:
    """Sum softplus(z_ij) over all pairs, z being -l for positives and l for others."""

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

    return _accumulate(rows, columns, scale, tile_size, weigh)


def _accumulate(
    rows: Tensor, columns: Tensor, scale: Tensor, tile_size: int, weigh: Callable[[slice, slice], Tile]
) -> PassResult:
    """Add up value and gradients over all tiles; `weigh` computes one."""
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
    return PassResult(value, bias_grad, scale_grad, row_grad.mul_(scale), column_grad.mul_(scale))


def _add_product(total: Tensor, weights: Tensor, embeds: Tensor) -> None:
    """Compute total += weights @ embeds in the weights' dtype, accumulated over tiles in that of `total`."""
    if weights.dtype == total.dtype:
        total.addmm_(weights, embeds.to(total.dtype))
    else:
        total += weights @ embeds.to(weights.dtype)


def _has_kernels(embeds: Tensor) -> bool:
    return embeds.dtype in kernels.HALF_PRECISION and kernels.kernels_run_on(embeds.device)


def _tiles(embeds: Tensor, tile_size: int) -> Iterator[slice]:
    """Yield slices of at most `tile_size` rows."""
    for start in range(0, len(embeds), tile_size):
        yield slice(start, min(start + tile_size, len(embeds)))


def _logits(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Return a tile's logits without bias, in the computing dtype."""
    return (rows.to(scale.dtype) * scale) @ columns.to(scale.dtype).T


def _diagonal(tile: Tensor, r: slice, c: slice, offset: int) -> Tensor | None:
    """Return a view of the positives in a tile, or None when there are none."""
    k = r.start + offset - c.start
    return tile.diagonal(k) if -tile.shape[0] < k < tile.shape[1] else None


def _weigh_positives(logits: Tensor, r: slice, c: slice, offset: int, positive_weight: float) -> None:
    """Add log c to the positives of a tile; before the exponential, or a large one would overflow first."""
    if positive_weight != 1 and (diagonal := _diagonal(logits, r, c, offset)) is not None:
        diagonal += _log(positive_weight)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _common_shift(rows: Tensor, columns: Tensor, scale: Tensor) -> float | None:
    """Return a number k such that no exp(l - k) overflows and few underflow.

    None on a GPU, where reading it would block, and for kernels, which need none.
    """
    if rows.is_cuda or _has_kernels(rows):
        return None
    largest = scale * rows.norm(dim=1).max() * columns.norm(dim=1).max()  # bounds every logit (Cauchy-Schwarz)
    return max(0.0, float(largest) - MAX_EXPONENT)


def _tile_log_sum_exps(logits: Tensor, shift: float | None) -> tuple[Tensor, Tensor]:
    """Return a tile's log-sum-exps by rows and by columns, from one exponential if all sums stay normal numbers."""
    if shift is not None:
        exponentials = torch.sub(logits, shift).exp_() if shift else logits.exp()
        sums = exponentials.sum(1), exponentials.sum(0)
        if min(sums[0].min(), sums[1].min()) > math.exp(NEGLIGIBLE - UNDERFLOW):
            return sums[0].log_().add_(shift), sums[1].log_().add_(shift)
    return logits.logsumexp(1), logits.logsumexp(0)


# -- autograd ----------------------------------------------------------------------------------------------------------


class LogPartitions(torch.autograd.Function):
    """(rows, own texts, scale, bias, gathered texts or None, ...) -> log-partitions of both directions, own pairs."""

    @staticmethod
    def forward(ctx, rows, texts, scale, bias, gathered, offset, positive_weight, tile_size):
        columns = texts if gathered is None else gathered
        with torch.autocast(rows.device.type, enabled=False):
            log_rows, log_columns = log_sum_exps(rows, columns, scale, bias, offset, positive_weight, tile_size)
        own = log_columns
        if gathered is not None:
            log_columns = all_gather(log_columns[None]).logsumexp(0)
            own = log_columns[offset : offset + len(texts)].clone()
        ctx.save_for_backward(rows, columns, scale, bias, log_rows, log_columns)
        ctx.is_gathered = gathered is not None
        ctx.arguments = offset, positive_weight, tile_size
        return log_rows, own

    @staticmethod
    def backward(ctx, row_upstream, column_upstream):
        rows, columns, scale, bias, log_rows, log_columns = ctx.saved_tensors
        offset, positive_weight, tile_size = ctx.arguments
        if ctx.is_gathered:
            column_upstream = all_gather(column_upstream)
        with torch.autocast(rows.device.type, enabled=False):
            result = exponential_pass(
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
        column_grad = sum_own_rows(result.column_grad, len(rows)) if ctx.is_gathered else result.column_grad
        gradients = result.row_grad.to(rows.dtype), column_grad.to(columns.dtype), result.scale_grad, result.bias_grad
        return *gradients, None, None, None, None


class PairSum(torch.autograd.Function):
    """A pass's value divided by the number of own pairs, with the gradients that the same pass computed."""

    @staticmethod
    def forward(ctx, rows, texts, scale, bias, gathered, offset, compute):
        columns = texts if gathered is None else gathered
        with torch.autocast(rows.device.type, enabled=False):
            result = compute(rows, columns, scale, bias, offset)
        # Summed over ranks here, not in backward: every rank gets here in the same order, whatever autograd does later.
        column_grad = result.column_grad if gathered is None else sum_own_rows(result.column_grad, len(rows))
        ctx.save_for_backward(result.row_grad, column_grad, result.scale_grad, result.bias_grad)
        ctx.pairs, ctx.dtypes = len(rows), (rows.dtype, texts.dtype, scale.dtype, bias.dtype)
        return result.value / len(rows)

    @staticmethod
    def backward(ctx, upstream):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((gradient * (upstream / ctx.pairs)).to(dtype) for gradient, dtype in gradients), None, None, None
