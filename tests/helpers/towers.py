"""Tiny models with five pairs of encoders, for tests that ask the same of each."""

from __future__ import annotations

import copy

import torch
from torch import nn

from modeling_amorlip import AmorLIPConfig


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 60, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
IMAGE = {"image_size": 32, "patch_size": 16}
GPT2 = {"model_type": "gpt2", **WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
RESNET = {"model_type": "amorlip_resnet", "width": 8, "depths": [1, 1, 1, 1], "num_attention_heads": 4}
TOWERS = {
    "clip": (
        {**SIZES, **IMAGE, "model_type": "clip_vision_model"},
        {**SIZES, **WORDS, "model_type": "clip_text_model", "eos_token_id": 3},
    ),
    "siglip": (
        {**SIZES, **IMAGE, "model_type": "siglip_vision_model"},
        {**SIZES, **WORDS, "model_type": "siglip_text_model", "projection_size": 32},
    ),
    "dinov2-bert": ({**SIZES, **IMAGE, "model_type": "dinov2"}, {**SIZES, **WORDS, "model_type": "bert"}),
    "vit-gpt2": ({**SIZES, **IMAGE, "model_type": "vit"}, GPT2),
    "resnet-clip": (
        {**RESNET, "image_size": 32, "output_dim": 24},
        {**SIZES, **WORDS, "model_type": "clip_text_model", "eos_token_id": 3},
    ),
}


def make_config(towers: str, head_type: str = "residual_mlp", layers: int = 2, **fields) -> AmorLIPConfig:
    """Make the configuration of a tiny model with some layers per tower; the ResNet has one block per stage."""
    vision, text = copy.deepcopy(TOWERS[towers])
    for tower in (vision, text):
        tower |= {name: layers for name in ("num_hidden_layers", "n_layer") if name in tower}
    heads = {"head_type": head_type, "size": 8}
    return AmorLIPConfig(vision_config=vision, text_config=text, projection_dim=24, amortizer_config=heads, **fields)


def make_inputs(pairs: int = 3) -> dict[str, torch.Tensor]:
    """Make a batch of pairs, the texts padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (pairs, 9), generator=generator)
    ids[:, 0], ids[:, 6], ids[:, 7:] = 0, 3, 1
    mask = (torch.arange(9) < 7).long().expand(pairs, 9)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(pairs, 3, 32, 32, generator=generator),
    }


def make_rows(pairs: int = 8) -> list[dict[str, torch.Tensor]]:
    """Make a dataset of pairs."""
    inputs = make_inputs(pairs)
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(pairs)]


def collate_pairs(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | bool]:
    """Make a batch that asks for the model's own loss."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"return_loss": True}


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of a model to 0, so that training mode is deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def replicate(model: nn.Module) -> nn.Module:
    """Replicate a model on the same device, as `torch.nn.parallel.replicate` does over GPUs."""
    modules = list(model.modules())
    places = {module: place for place, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[places[child]]
        for name, parameter in module._parameters.items():
            value = None if parameter is None else parameter.clone()
            if value is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, value)
                replica._former_parameters[name] = value
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[0]
