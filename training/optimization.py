"""A learning rate that is a function of the step, steps that can be skipped, and norms to log."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.config import OptimizationConfig


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimizationConfig
) -> float:
    """Set the learning rate of every group for a step (from 0), and return that of the first group."""
    factor = learning_rate_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return optimizer.param_groups[0]["lr"]


def learning_rate_factor(step: int, total_steps: int, config: OptimizationConfig) -> float:
    """Return the fraction of its peak that the learning rate has in a step (from 0).

    After a linear warmup, `cosine` decays to 0 along a half cosine, `constant` stays, and `wsd` (warmup, stable, decay)
    stays until it decays linearly to 0 in the last `decay_steps`.
    """
    warmup_steps = config.warmup_steps
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.lr_scheduler_type == "constant":
        return 1.0
    if config.lr_scheduler_type == "wsd":
        return min(1.0, (total_steps - step) / max(1, config.decay_steps))
    return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2


@torch.no_grad()
def constrain_logit_scale_(
    log_scale: Tensor, previous: Tensor, slow_above: float | None, max_logit_scale: float
) -> None:
    """Limit the change of the logit scale in a step, in place, without reading it back to the host.

    Args:
        log_scale: the parameter, a logarithm.
        previous: its value before the step.
        slow_above: logit scale from which on only a third of the update is taken (the paper: tau <= 0.03).
        max_logit_scale: upper bound of the logit scale.
    """
    if slow_above is not None:
        slowed = previous + (log_scale - previous) / 3
        log_scale.copy_(torch.where(previous >= math.log(slow_above), slowed, log_scale))
    log_scale.clamp_(max=math.log(max_logit_scale))


def clip_gradients(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, parameters: list[nn.Parameter], max_norm: float
) -> Tensor:
    """Scale gradients so that their l2 norm is at most `max_norm` (0: any), and return the norm [] before."""
    if accelerator.scaler is not None and optimizer not in accelerator._optimizers:
        accelerator.unscale_gradients(optimizer)  # Accelerate unscales those that it has prepared
    norm = accelerator.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def step_if_finite(accelerator: Accelerator, optimizer: AcceleratedOptimizer, grad_norm: Tensor) -> Tensor:
    """Take a step and clear the gradients; non-finite gradients change nothing.

    Nothing is read back to the host with a fused optimizer.

    Args:
        accelerator: holds the loss scaler, if any.
        optimizer: the prepared optimizer.
        grad_norm: l2 norm [] of all gradients.

    Returns:
        1 if the step was skipped, else 0, as a tensor [].
    """
    skipped = (~grad_norm.isfinite()).float()
    if accelerator.scaler is not None:
        optimizer.step()  # the scaler checks the gradients itself
    elif optimizer.optimizer.defaults.get("fused"):
        optimizer.optimizer.found_inf = skipped  # read by the fused kernel
        optimizer.step()
    elif not skipped.item():
        optimizer.step()
    optimizer.zero_grad()
    return skipped


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return the l2 norms [] of the gradients, as `gradient/vision`, `gradient/text` and `gradient/other`."""
    groups = _group_parameters(model)
    return {f"gradient/{name}": _norm(p.grad for p in group if p.grad is not None) for name, group in groups.items()}


def parameter_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return the l2 norms [] of the trained parameters, as `parameter/vision` and so on."""
    return {f"parameter/{name}": _norm(group) for name, group in _group_parameters(model).items()}


def update_norms(model: nn.Module, optimizer: torch.optim.Optimizer, skipped: Tensor) -> dict[str, Tensor]:
    """Return the l2 norms [] of what AdamW's last step added to the parameters, as `update/vision` and so on.

    There are none for other optimizers.

    Updates are computed again from the optimizer's state, one parameter at a time: keeping the previous parameters
    would take a copy of the model.

    Args:
        model: the model.
        optimizer: its optimizer, just after a step.
        skipped: [], 1 if that step was skipped, else 0.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return {}
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    norms = {
        name: _norm(_adamw_update(optimizer, options[id(p)], p) for p in group)
        for name, group in _group_parameters(model).items()
    }
    # Not a product: before the first step that counts, the state gives NaN.
    return {f"update/{name}": torch.where(skipped > 0, 0.0, norm) for name, norm in norms.items()}


@torch.no_grad()
def _adamw_update(optimizer: torch.optim.AdamW, group: dict, parameter: Tensor) -> Tensor:
    """Return the change of a parameter in AdamW's last step."""
    state = optimizer.state.get(parameter)
    if not state:  # the only step so far was skipped
        return torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    step = state["step"].to(parameter.device)
    denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
    direction = (state["exp_avg"] / denominator).mul_(group["lr"] / (1 - beta1**step))
    decay = group["lr"] * group["weight_decay"]
    # new = (1 - decay) old - direction, so new - old = -(decay new + direction) / (1 - decay).
    return direction.add_(parameter, alpha=decay).div_(decay - 1)


def _group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of the image encoder, of the text encoder and of the rest."""
    groups: dict[str, list[nn.Parameter]] = {"vision": [], "text": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = name.split(".")[0].removesuffix("_model")
            groups[first if first in groups else "other"].append(parameter)
    return {name: group for name, group in groups.items() if group}


@torch.no_grad()
def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the l2 norm [] of all tensors together, read one after the other."""
    whole, squares, group = [], [], None
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            squares.append(tensor.to_local().float().norm().square())
            group = tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)  # the processes that share a model
        else:
            whole.append(tensor.float().norm())
    if squares:
        square = torch.stack(squares).sum()
        dist.all_reduce(square, group=group)
        whole.append(square.sqrt())
    return torch.stack(whole).norm() if whole else torch.zeros(())
