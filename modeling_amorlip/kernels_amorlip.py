"""Triton kernels that take the place of a tile's inner loop for half-precision embeddings on a GPU.

One program computes one block of logits l_ij = s <x_i, y_j> in float32 and reduces it, or turns it into weights, while
it is still in registers, so that logits never reach memory. `TRITON_INTERPRET=1` runs the kernels on the CPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU comes without it
    triton = None

PANEL = 8192  # rows whose partial log-sum-exps are held at a time: PANEL / BLOCK floats a column
BLOCK = 128
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCKS = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_K": 64, "UPCAST": INTERPRETED}  # which cannot multiply bfloat16
OPTIONS = {"num_warps": 8, "num_stages": 3}
HALF_PRECISION = (torch.bfloat16, torch.float16)


def kernels_run_on(device: torch.device) -> bool:
    """Whether there is Triton, and a GPU that it serves: NVIDIA's from Ampere on, or any of AMD's."""
    if triton is None:
        return False
    if device.type != "cuda":
        return INTERPRETED
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def log_sum_exps(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, log_weight: float) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps of logits without bias, `log_weight` added to the positives: ([n], [N]), float32."""
    rows, columns, scale = rows.contiguous(), columns.contiguous(), scale.float()
    number = len(columns)
    log_rows = []
    log_columns = rows.new_full((number,), -torch.inf, dtype=torch.float32)
    for start in range(0, len(rows), PANEL):
        panel = rows[start : start + PANEL]
        blocks = triton.cdiv(len(panel), BLOCK), triton.cdiv(number, BLOCK)
        by_row = rows.new_empty(blocks[1], len(panel), dtype=torch.float32)
        by_column = rows.new_empty(blocks[0], number, dtype=torch.float32)
        _log_sum_exps_kernel[blocks](
            panel,
            columns,
            scale,
            by_row,
            by_column,
            len(panel),
            number,
            rows.shape[1],
            start + offset,
            log_weight,
            **BLOCKS,
            **OPTIONS,
        )
        log_rows.append(by_row.logsumexp(0))
        log_columns = torch.logaddexp(log_columns, by_column.logsumexp(0))
    return torch.cat(log_rows), log_columns


def exponential_weights(
    rows: Tensor, columns: Tensor, scale: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """Weights u_i exp(l_ij - a_i) + v_j exp(l_ij - b_j) with positives left at 0, and their sum.

    The weights [n, N] are in bfloat16 for bfloat16 embeddings, else in float32, since float16 could overflow.
    """
    rows, columns = rows.contiguous(), columns.contiguous()
    a, b, u, v = (value.float().contiguous() for value in (a, b, u, v))
    blocks = triton.cdiv(len(rows), BLOCK), triton.cdiv(len(columns), BLOCK)
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    weights = rows.new_empty(len(rows), len(columns), dtype=dtype)
    sums = rows.new_empty(blocks, dtype=torch.float32)
    _exponential_weights_kernel[blocks](
        rows,
        columns,
        scale.float(),
        a,
        b,
        u,
        v,
        weights,
        sums,
        len(rows),
        len(columns),
        rows.shape[1],
        offset,
        **BLOCKS,
        **OPTIONS,
    )
    return weights, sums.sum()


if triton is not None:

    @triton.jit
    def _logits_block(
        x,
        y,
        scale,
        n,
        number,
        dim,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """(logits, row indices [M, 1], column indices [1, N], which of the block there are) of this program."""
        i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Indices past the end read the last row instead: what comes of them is masked or never stored.
        x_rows = x + tl.minimum(i, n - 1).to(tl.int64)[:, None] * dim
        y_rows = y + tl.minimum(j, number - 1).to(tl.int64)[None, :] * dim
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, dim, BLOCK_K):
            inside = start + k < dim
            left = tl.load(x_rows + start + k[None, :], mask=inside[None, :], other=0.0)
            right = tl.load(y_rows + start + k[:, None], mask=inside[:, None], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            products = tl.dot(left, right, products)
        i, j = i[:, None], j[None, :]
        return products * tl.load(scale), i, j, (i < n) & (j < number)

    @triton.jit(do_not_specialize=["offset"])
    def _log_sum_exps_kernel(
        x,
        y,
        scale,
        by_row,
        by_column,
        n,
        number,
        dim,
        offset,
        log_weight,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """by_row [column blocks, n] and by_column [row blocks, N]: log-sum-exps of this program's block."""
        logits, i, j, exists = _logits_block(x, y, scale, n, number, dim, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST)
        logits = tl.where(j == i + offset, logits + log_weight, logits)
        logits = tl.where(exists, logits, float("-inf"))
        row_max, column_max = tl.max(logits, 1), tl.max(logits, 0)
        row_shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        column_shift = tl.where(column_max == float("-inf"), 0.0, column_max)
        row_sum = tl.sum(tl.exp(logits - row_shift[:, None]), 1)
        column_sum = tl.sum(tl.exp(logits - column_shift[None, :]), 0)
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        to_row = by_row + tl.program_id(1).to(tl.int64) * n + rows
        to_column = by_column + tl.program_id(0).to(tl.int64) * number + columns
        tl.store(to_row, row_shift + tl.log(row_sum), mask=rows < n)
        tl.store(to_column, column_shift + tl.log(column_sum), mask=columns < number)

    @triton.jit(do_not_specialize=["offset"])
    def _exponential_weights_kernel(
        x,
        y,
        scale,
        a,
        b,
        u,
        v,
        weights,
        sums,
        n,
        number,
        dim,
        offset,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """weights [n, N] and sums [row blocks, column blocks] of this program's block."""
        logits, i, j, exists = _logits_block(x, y, scale, n, number, dim, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST)
        by_row = tl.load(u + i, mask=i < n, other=0.0) * tl.exp(logits - tl.load(a + i, mask=i < n, other=float("inf")))
        by_column = tl.load(v + j, mask=j < number, other=0.0) * tl.exp(
            logits - tl.load(b + j, mask=j < number, other=float("inf"))
        )
        block = tl.where(exists & (j != i + offset), by_row + by_column, 0.0)
        tl.store(weights + i.to(tl.int64) * number + j, block.to(weights.dtype.element_ty), mask=exists)
        tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(block))
