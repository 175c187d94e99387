"""Brute-force references of the loss, in float64."""

from __future__ import annotations

import torch


def make_batch(n, d=16, scale=20.0, bias=None, dtype=torch.float64, seed=0):
    """Make unit-norm images and texts [n, d], a scale and, if given, a bias, all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, generator=generator).double(), dim=-1) for _ in range(2))
    leaves = [x, y, torch.tensor(scale).double()] + ([torch.tensor(bias).double()] if bias is not None else [])
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def brute_force_log_partitions(x, y, s, b=None, c=1e-3):
    """Return log Z_i and log Z_j from the whole matrix of logits."""
    logits = s * x @ y.T + (0 if b is None else b)
    weights = torch.ones_like(logits).fill_diagonal_(c)
    weighted = logits + weights.log()
    return weighted.logsumexp(1), weighted.logsumexp(0)


def brute_force_loss(x, y, s, b, log_lambda_image, log_lambda_text, c=1e-3):
    """Return paper Eq. 6 from the whole matrix of logits."""
    logits = s * x @ y.T + (0 if b is None else b)
    log_z_image, log_z_text = brute_force_log_partitions(x, y, s, b, c)
    terms = (log_z_image - log_lambda_image).exp().mean() + (log_z_text - log_lambda_text).exp().mean()
    return terms - 2 * logits.diagonal().mean()


def assert_close(actual, expected, rtol, name):
    """Compare by the norm of the difference, relative to the expected norm."""
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"
