"""Objectives and their settings under test."""

from __future__ import annotations

from modeling_amorlip import AmorLIPConfig


D = 16
VARIANTS = [
    ("clip", {}),
    ("dcl", {}),
    ("siglip", {}),
    ("sogclr", {}),
    ("fastclip", {"version": "v1"}),
    ("fastclip", {"version": "v2"}),
    ("fastclip", {"version": "v3"}),
    ("fastclip", {"version": "v3", "gamma_offset": 10.0}),
    ("neuclip", {}),
    *(
        ("amorlip", {"partition_source": source, "amortization": "l2_log", "reinitialize": True})
        for source in ("target_network", "blended", "online", "batch")
    ),
    ("amorlip", {"recent_pairs": 24}),
]


def make_config(**changes):
    encoder = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    fields = dict(
        vision_config={"model_type": "clip_vision_model", "image_size": 4, "patch_size": 4, **encoder},
        text_config={"model_type": "clip_text_model", "vocab_size": 8, "max_position_embeddings": 4, **encoder},
        projection_dim=D,
        amortizer_config={"size": 32},
    )
    return AmorLIPConfig(**fields | changes)
