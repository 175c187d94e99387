"""Optimizers by name, from torch or timm, with CLIP's parameter groups and layer-wise learning rates."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modeling_amorlip.cli_amorlip import UserError
from training.config import OptimizationConfig, unknown_name
from training.model.encoder import list_layers


TORCH_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
"""torch's optimizers that need neither a closure nor sparse or two-dimensional parameters."""
FUSED = ("adamw", "adam")
"""Those that run as one kernel, which can also skip a step without asking the host."""
ADAM_FIELDS = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}
OWN_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_beta1", "eps": "adam_epsilon"}

OPTIMIZER_SETTINGS = ("peak_lr", "weight_decay", "betas", "eps", "decoupled_weight_decay")
"""Keys of parameter groups that hold settings of the run, beside `optimizer_args`."""


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """Return the optimizer over a model's trained parameters.

    Raises:
        UserError: there is no such optimizer, or it does not take its settings.
    """
    name = config.optimizer.lower()
    try:
        optimizer_class = find_optimizer(name)
        options = {**_named_options(name, optimizer_class, config), **config.optimizer_args}
        optimizer = optimizer_class(parameter_groups(model, config), lr=config.learning_rate, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"optimizer {config.optimizer}: {error}") from None
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return torch's optimizer of a name or, where timm is installed, timm's.

    Raises:
        UserError: there is none.
    """
    if name in TORCH_OPTIMIZERS:
        return TORCH_OPTIMIZERS[name]
    try:
        import timm.optim  # only runs with its optimizers need it
    except (ImportError, RuntimeError):  # the latter from a torchvision that does not fit torch
        hint = "timm, which has others, cannot be imported."
        raise UserError(f"{unknown_name('optimizer', name, list(TORCH_OPTIMIZERS))} {hint}") from None
    names = timm.optim.list_optimizers()
    if name not in names:
        raise UserError(unknown_name("optimizer", name, [*TORCH_OPTIMIZERS, *names]))
    if timm.optim.get_optimizer_info(name).second_order:
        raise UserError(f"optimizer {name} needs second derivatives, which the loss does not have: choose another.")
    return timm.optim.get_optimizer_class(name)


def _named_options(name: str, optimizer_class: Callable[..., Any], config: OptimizationConfig) -> dict[str, Any]:
    """Return the options that fields set, and check `optimizer_args`."""
    parameters = inspect.signature(optimizer_class).parameters
    is_adam = name in TORCH_OPTIMIZERS and "betas" in parameters
    reserved = OWN_FIELDS if is_adam else {"lr": "learning_rate", "weight_decay": "weight_decay"}
    choices = [key for key in parameters if key not in ("params", "args", "kwargs", *reserved)]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in config.optimizer_args:
        if key in reserved:
            raise UserError(f"optimizer_args.{key}: set it with --{reserved[key]}.")
        if key not in choices and not open_ended:
            raise UserError(unknown_name(f"option of {name}", key, choices, "optimizer_args."))
    if is_adam:
        fused = {"fused": True} if name in FUSED else {}
        return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon, **fused}
    for field, default in ADAM_FIELDS.items():
        if getattr(config, field) != default:
            raise UserError(f"{field} has no effect on {name}: leave it out, and use optimizer_args.")
    return {}


def parameter_groups(model: nn.Module, config: OptimizationConfig) -> list[dict[str, Any]]:
    """Return groups of the trained parameters: matrices, vectors and the logit scale, per learning rate.

    Weight decay applies to matrices only, not to biases, norms and the logit scale, which has its own learning rate.
    """
    scales = layer_scales(model, config.layer_decay)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for scale in sorted({scales.get(name, 1.0) for name, _ in named} | {1.0}, reverse=True):
        members = [p for name, p in named if scales.get(name, 1.0) == scale and not name.endswith("logit_scale")]
        rate = {} if scale == 1.0 else {"lr": scale * config.learning_rate}
        groups.append({"params": [p for p in members if p.ndim >= 2], "weight_decay": config.weight_decay, **rate})
        groups.append({"params": [p for p in members if p.ndim < 2], "weight_decay": 0.0, **rate})
    logit_scale = [p for name, p in named if name.endswith("logit_scale")]
    # Without layer-wise rates, these are three groups, as in earlier checkpoints.
    groups.insert(2, {"params": logit_scale, "weight_decay": 0.0, "lr": config.logit_scale_learning_rate})
    return groups


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor of the learning rate of every parameter in the towers (Bao et al. 2022, BEiT).

    The last of a tower's L layers has `decay`, the first decay^L, and what comes before it decay^(L + 1). What comes
    after the last layer, and what is outside of the towers, has 1.
    """
    if decay == 1.0:
        return {}
    scales: dict[str, float] = {}
    for tower_name, tower in model.named_modules():
        if tower_name.rpartition(".")[2] not in ("vision_model", "text_model") or tower_name in scales:
            continue
        layer_of = {id(p): place for place, layer in enumerate(list_layers(tower)) for p in layer.parameters()}
        depth, position = max(layer_of.values(), default=-1) + 1, -1
        for name, parameter in tower.named_parameters():
            position = max(position, layer_of.get(id(parameter), position))
            after_last = id(parameter) not in layer_of and position == depth - 1
            place = depth if after_last else layer_of.get(id(parameter), position)
            scales.setdefault(f"{tower_name}.{name}", decay ** (depth - place))
    return scales
