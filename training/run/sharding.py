"""FSDP2: parameters, gradients and optimizer states divided among processes, as Accelerate's settings ask for."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.distributed_amorlip import all_reduce_mean_, world_size
from training.model.encoder import PairEncoder, list_layers


REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params is not supported: leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "use --gradient_checkpointing true for fsdp_activation_checkpointing"),
    "FSDP_STATE_DICT_TYPE": (
        "SHARDED_STATE_DICT",
        "checkpoints are sharded, and the finished model is saved whole: set fsdp_state_dict_type to "
        "SHARDED_STATE_DICT or leave it out",
    ),
    "FSDP_AUTO_WRAP_POLICY": (
        "TRANSFORMER_BASED_WRAP",
        "the encoders' layers are sharded one by one: set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP or leave "
        "it out",
    ),
    "FSDP_IGNORED_MODULES": ("", "every module is sharded: leave fsdp_ignored_modules out"),
}
"""Accelerate's settings that have one possible value, with the message for another."""
PARALLELISMS = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor",
    "PARALLELISM_CONFIG_CP_SIZE": "context",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence",
}
"""Kinds of parallelism that Accelerate offers besides, by the variable with their number of processes."""


@dataclass(frozen=True)
class ShardingSettings:
    """What Accelerate's settings say about FSDP2.

    Args:
        layer_classes: class names of the layers that are sharded one by one; by default the elements of the encoders'
            innermost module lists.
        reshard_after_forward: whether a layer's parameters are freed after its forward pass and gathered again in the
            backward pass.
        replicas: groups of processes that hold a whole model each, sharded within the group (HSDP).
    """

    layer_classes: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    replicas: int = 1


def take_sharding_settings(environ: MutableMapping[str, str]) -> ShardingSettings | None:
    """Return the settings of FSDP2 that `accelerate launch` has put into the environment, and remove its switch.

    Without the switch, neither Accelerate nor Transformers shards anything by itself.

    Raises:
        UserError: the settings ask for FSDP1, DeepSpeed, Megatron or something else that is not supported.
    """
    for name, library in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_on(environ.get(name)):
            raise UserError(
                f"Accelerate is set up for {library}, which is not supported: use "
                "training/accelerate_configs/fsdp2.yaml, which shards parameters and optimizer states as well."
            )
    uses_parallelism = _is_on(environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None))
    for name, kind in PARALLELISMS.items():
        if uses_parallelism and environ.get(name, "1") != "1":
            raise UserError(f"Accelerate is set up for {kind} parallelism, which is not supported: leave it out.")
    if not _is_on(environ.pop("ACCELERATE_USE_FSDP", None)):
        return None
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"Accelerate is set up for FSDP {version}; only FSDP 2 is supported: set fsdp_version to 2.")
    for name, (value, message) in REFUSED.items():
        if environ.get(name, value).lower() not in (value.lower(), "none", ""):
            raise UserError(f"Accelerate's {name.lower()} is {environ[name]}: {message}.")
    reshard = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise UserError(f"Accelerate's fsdp_reshard_after_forward is {reshard}: choose true or false.")
    names = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    replicas = environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1") if uses_parallelism else "1"
    return ShardingSettings(
        layer_classes=tuple(name.strip() for name in names.split(",") if name.strip() not in ("", "None")),
        reshard_after_forward=reshard == "true",
        replicas=int(replicas),
    )


def _is_on(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1", "yes")


def shard_encoder(encoder: PairEncoder, settings: ShardingSettings, device: torch.device) -> None:
    """Shard an encoder in place: each layer is a unit, the heads are one, and the rest is one.

    Parameters are gathered and gradients are reduced in float32, so that mixed precision, which is autocast's, computes
    as with a whole model. Scalars (logit scale and bias) cannot be sharded: every process holds them, and their
    gradients are averaged.

    Args:
        encoder: the encoder, whose weights are those of the first process afterwards.
        settings: what is sharded.
        device: device of training.

    Raises:
        UserError: the settings do not fit the model or the number of processes.
    """
    encoder.to(device)
    mesh = build_mesh(device, settings.replicas)
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        dist.broadcast(tensor.detach(), 0)
    scalars = {parameter for parameter in encoder.parameters() if parameter.ndim == 0}
    units = [*find_layers(encoder, settings.layer_classes), encoder.model.amortizer]
    for unit in units:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh, reshard_after_forward=settings.reshard_after_forward)
    fully_shard(encoder, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(average_gradient)


def average_gradient(parameter: Tensor) -> None:
    """Average the gradient of a parameter that every process holds over all processes."""
    if parameter.grad is not None:
        all_reduce_mean_([parameter.grad])


def build_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """Return the mesh to shard over: all processes, or those of each replica.

    Raises:
        UserError: the processes cannot be divided among the replicas.
    """
    processes = world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (processes,))
    if replicas < 1 or processes % replicas:
        raise UserError(
            f"Accelerate's dp_replicate_size is {replicas}, which does not divide the {processes} processes."
        )
    return init_device_mesh(device.type, (replicas, processes // replicas), mesh_dim_names=("replicate", "shard"))


def find_layers(encoder: PairEncoder, class_names: tuple[str, ...] = ()) -> list[nn.Module]:
    """Return the layers of both towers that are sharded one by one.

    Args:
        encoder: the encoder.
        class_names: names of the layers' classes; none for the elements of the innermost module lists.

    Raises:
        UserError: there is no module of a named class.
    """
    towers = (encoder.model.vision_model, encoder.model.text_model)
    if not class_names:
        return [layer for tower in towers for layer in list_layers(tower)]
    modules = [module for tower in towers for module in tower.modules()]
    for name in class_names:
        if not any(type(module).__name__ == name for module in modules):
            layers = sorted({type(layer).__name__ for tower in towers for layer in list_layers(tower)})
            raise UserError(
                f"Accelerate's fsdp_transformer_layer_cls_to_wrap names {name}, which this model does not have: name "
                f"{', '.join(layers)}, or leave it out."
            )
    return [module for module in modules if type(module).__name__ in class_names]


class AutocastModule(nn.Module):
    """Run a module in the precision of training, as Accelerate does with a module that it wraps."""

    def __init__(self, module: nn.Module, accelerator: Accelerator):
        super().__init__()
        self.module, self._autocast = module, accelerator.autocast

    def forward(self, **batch: Any) -> Any:
        """Run the module on a batch."""
        with self._autocast():
            return self.module(**batch)
