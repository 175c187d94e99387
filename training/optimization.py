"""AdamW with CLIP's parameter groups, and a learning rate that is a plain function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.config import PretrainConfig


def make_optimizer(model: nn.Module, arguments: PretrainConfig) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and the logit scale do not; the logit scale has a learning rate of its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scale = [p for name, p in named if name.endswith("logit_scale")]
    others = [p for name, p in named if not name.endswith("logit_scale")]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": scale, "weight_decay": 0.0, "lr": arguments.logit_scale_learning_rate},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,  # one kernel for all parameters, which can also skip a step without asking the host
    )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, warmup_steps: int) -> float:
    """Sets every group's rate for `step` (from 0): linear warm-up, then a cosine to 0. Returns the first group's."""
    if step < warmup_steps:
        factor = (step + 1) / warmup_steps
    else:
        factor = (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return optimizer.param_groups[0]["lr"]


@torch.no_grad()
def constrain_logit_scale_(logit_scale: Tensor, before: Tensor, slow_above: float | None, maximum: float) -> None:
    """After a step: a third of the update above `slow_above` (the paper: tau <= 0.03), and never more than `maximum`.

    Args:
        logit_scale: the parameter (a logarithm), changed in place. before: its value before the step.
        slow_above, maximum: logit scales, not logarithms. Nothing is read back to the host.
    """
    if slow_above is not None:
        slowed = before + (logit_scale - before) / 3
        logit_scale.copy_(torch.where(before >= math.log(slow_above), slowed, logit_scale))
    logit_scale.clamp_(max=math.log(maximum))


def skip_if_not_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Makes the fused optimiser's next step do nothing if the norm is not finite; returns whether, [] of 0 or 1."""
    found = (~grad_norm.isfinite()).float()
    optimizer.found_inf = found
    return found


def norms_by_group(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """l2 norms {"gradient/vision": [], "parameter/vision": [], "update/vision": [], ...} of both encoders and the rest.

    Args:
        before: parameters before the step, for the norm of the update.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"vision": [], "text": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = name.split(".")[0].removesuffix("_model")
            groups[first if first in groups else "other"].append((name, parameter))
    norms = {}
    for group, named in groups.items():
        if not named:
            continue
        if before is None:
            norms[f"gradient/{group}"] = _norm([p.grad for _, p in named if p.grad is not None])
        else:
            norms[f"parameter/{group}"] = _norm([p for _, p in named])
            norms[f"update/{group}"] = _norm([p - before[name] for name, p in named])
    return norms


@torch.no_grad()
def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float().norm() for tensor in tensors]).norm() if tensors else torch.zeros(())
