"""Compile encoders with torch.compile, without graph breaks and with one program for all lengths of texts."""

from __future__ import annotations

from typing import Any

import torch

from training.model.encoder import PairEncoder, list_layers


RECOMPILE_LIMIT = 64
"""Programs per function: towers share functions of Transformers, which also run without gradients and in evaluation."""


def compile_encoder(encoder: PairEncoder, by_layer: bool = False, backend: str = "inductor") -> None:
    """Compile an encoder in place.

    Each tower is compiled as a whole. A text tower is compiled once for the first length of texts and once for all
    others. The rest, which depends on the lengths of a batch's texts, is not compiled.

    Args:
        encoder: the encoder.
        by_layer: whether to compile the towers' layers instead, as a sharded encoder needs, which gathers the
            parameters of a layer before its forward pass.
        backend: torch.compile's backend.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Random numbers are drawn as without compilation: gradient caching draws them twice, in two programs.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    for tower in (encoder.model.vision_model, encoder.model.text_model):
        if not by_layer:
            tower.compile(backend=backend, options=options)
            continue
        for layer in list_layers(tower):
            layer.forward = torch.compile(layer.forward, backend=backend, options=options)
