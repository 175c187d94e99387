"""Sharded checkpoints: every process writes its part, by torch's distributed checkpoint; any number of them reads it.

The folders have the names that Accelerate gives them, so `accelerate merge-weights` reads the model's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_amorlip.distributed_amorlip import world_size


MODEL_FOLDER, OPTIMIZER_FOLDER, AVERAGE_FOLDER = "pytorch_model_fsdp_0", "optimizer_0", "average"


def save_sharded(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this process's part of a module and its optimizer. All processes must call this."""
    broadcast_whole(module.buffers())
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp.save({"model": model_state}, checkpoint_id=folder / MODEL_FOLDER)
    dcp.save({"optimizer": optimizer_state}, checkpoint_id=folder / OPTIMIZER_FOLDER)


def is_sharded(folder: Path) -> bool:
    """Return whether a checkpoint is sharded."""
    return (folder / MODEL_FOLDER).is_dir()


def load_sharded(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore a module and its optimizer, sharded among any number of processes or whole, from a sharded checkpoint."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp.load({"model": model_state}, checkpoint_id=folder / MODEL_FOLDER)
    dcp.load({"optimizer": optimizer_state}, checkpoint_id=folder / OPTIMIZER_FOLDER)
    set_state_dict(module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def save_sharded_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's part of the average of the weights. All processes must call this."""
    broadcast_whole(tensors.values())
    dcp.save({"average": tensors}, checkpoint_id=folder / AVERAGE_FOLDER)


def load_sharded_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the average of the weights from a sharded checkpoint, in place."""
    dcp.load({"average": tensors}, checkpoint_id=folder / AVERAGE_FOLDER)


def load_whole(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore a sharded module and its optimizer from a checkpoint that holds them whole."""
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    saved = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved["state"] = {
        index: {name: shard_like(value, parameters[index]) for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    optimizer.load_state_dict(saved)


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Return a tensor of a parameter's shape divided among processes as the parameter is; anything else stays."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def broadcast_whole(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values of those tensors that are not sharded, such as running statistics."""
    for tensor in tensors:
        if world_size() > 1 and not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), 0)


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights and buffers of a sharded module, in every process."""
    weights: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return weights


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors whole, in every process."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
