"""Translate between OpenCLIP's and our names, layouts and configurations: CLIP's ViT or ResNet and its text encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .configuration_amorlip import AmorLIPConfig
from .modeling_amorlip import AmorLIPModel
from .open_clip_images_amorlip import open_clip_preprocess


TEXT_NAMES = (
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
VIT_NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    *TEXT_NAMES,
)
RESNET_NAMES = (("visual.", "vision_model."), *TEXT_NAMES)
LAYER_NAMES = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # OpenCLIP multiplies from the right

# Fields of OpenCLIP's model_cfg that CLIP's architecture has; others, if set, ask for another one.
MODEL_FIELDS = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
}
VISION_FIELDS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"}
TEXT_FIELDS = {
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "pool_type",
    "eos_id",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "tokenizer_mode",
}


def open_clip_architecture(weights: dict[str, Tensor], model_cfg: dict, hidden_act: str) -> dict[str, Any]:
    """Return fields of an `AmorLIPConfig`, read from the shapes and, where these do not tell, from `model_cfg`.

    Raises:
        ValueError: the architecture is not CLIP's.
    """
    _refuse_unknown("model_cfg", model_cfg, MODEL_FIELDS)
    vision_cfg, text_cfg = model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {})
    _refuse_unknown("vision_cfg", vision_cfg, VISION_FIELDS)
    _refuse_unknown("text_cfg", text_cfg, TEXT_FIELDS)
    if text_cfg.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(f"text_cfg.pool_type is {text_cfg['pool_type']!r}; argmax and eos can be converted.")
    try:
        is_resnet = "visual.attnpool.c_proj.weight" in weights
        return {
            "text_config": _text_encoder(weights, text_cfg, hidden_act),
            "vision_config": _resnet(weights, vision_cfg) if is_resnet else _vit(weights, vision_cfg, hidden_act),
            "projection_dim": weights["text_projection"].shape[1],
        }
    except KeyError as error:
        raise ValueError(
            f"The checkpoint has no {error}, so it is no CLIP of OpenCLIP's (ViT or ResNet, and CLIP's text encoder). "
            "SigLIP is converted from its repository for Transformers."
        ) from None


def _text_encoder(weights: dict[str, Tensor], text_cfg: dict, hidden_act: str) -> dict[str, Any]:
    vocab_size, width = weights["token_embedding.weight"].shape
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "max_position_embeddings": len(weights["positional_embedding"]),
        **_transformer(weights, "transformer", hidden_act, text_cfg.get("heads", max(1, width // 64))),
        # OpenCLIP pools at the highest id, CLIP's end of text.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else vocab_size - 1,
    }


def _resnet(weights: dict[str, Tensor], vision_cfg: dict) -> dict[str, Any]:
    output_dim, channels = weights["visual.attnpool.c_proj.weight"].shape
    grid = math.isqrt(len(weights["visual.attnpool.positional_embedding"]) - 1)
    return {
        "model_type": "amorlip_resnet",
        "width": channels // 32,
        "depths": [_count(weights, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
        "num_attention_heads": channels // vision_cfg.get("head_width", 64),
        "image_size": vision_cfg.get("image_size", 32 * grid),
        "output_dim": output_dim,
    }


def _vit(weights: dict[str, Tensor], vision_cfg: dict, hidden_act: str) -> dict[str, Any]:
    width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    heads = width // vision_cfg.get("head_width", 64)
    if not vision_cfg:
        heads = max(1, min(16, heads))  # ViT-H and larger ones have wider heads, not more
    grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
    if grid * grid != len(weights["visual.positional_embedding"]) - 1:
        raise ValueError("The vision encoder's images are not square; CLIP's of Transformers are.")
    return {
        "model_type": "clip_vision_model",
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        **_transformer(weights, "visual.transformer", hidden_act, heads),
    }


def from_open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert OpenCLIP's state dict to the names and layouts of `AmorLIPModel`'s."""
    table = RESNET_NAMES if "visual.attnpool.c_proj.weight" in weights else VIT_NAMES
    ours = {}
    for name, weight in weights.items():
        renamed = rename(name, table, LAYER_NAMES)
        if name in TRANSPOSED:
            weight = weight.T
        if ".attn.in_proj_" in name:
            for part, chunk in zip("qkv", weight.chunk(3), strict=True):
                ours[renamed.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = chunk
        else:
            ours[renamed] = weight
    return ours


def rename(name: str, prefixes, parts) -> str:
    """Replace the first prefix that fits, and all parts, of a name; both are pairs (old, new)."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    for old, new in parts:
        name = name.replace(old, new)
    return name


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def _transformer(weights: dict[str, Tensor], prefix: str, hidden_act: str, num_attention_heads: int) -> dict[str, Any]:
    intermediate_size, hidden_size = weights[f"{prefix}.resblocks.0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": _count(weights, f"{prefix}.resblocks."),
        "num_attention_heads": num_attention_heads,
        "hidden_act": hidden_act,
    }


def _refuse_unknown(name: str, fields: dict, known: set[str]) -> None:
    if unknown := sorted(field for field, value in fields.items() if field not in known and value):
        raise ValueError(f"open_clip_config.json: {name} sets {unknown}, which CLIP's architecture does not have.")


def open_clip_config(model: AmorLIPModel, processor=None) -> dict:
    """Return the content of `open_clip_config.json`.

    Raises:
        ValueError: OpenCLIP has no such architecture or preprocessing.
    """
    config = model.config
    vision, text = config.vision_config, config.text_config
    is_resnet = vision.model_type == "amorlip_resnet"
    activation = _check_architecture(config)
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    # OpenCLIP reads texts at their highest token, CLIP's end of text; in old checkpoints that is eos_token_id 2.
    if text.eos_token_id not in (2, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    preprocess_cfg: dict[str, Any] = {}  # OpenCLIP has defaults
    if processor is not None:
        text_cfg["hf_tokenizer_name"] = "."  # OpenCLIP looks into the folder itself
        preprocess_cfg = open_clip_preprocess(processor.image_processor, vision.image_size)
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {"image_size": vision.image_size, **(_resnet_cfg(vision) if is_resnet else _vit_cfg(vision))},
        "text_cfg": text_cfg,
    }
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = model.logit_bias.item()
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def _check_architecture(config: AmorLIPConfig) -> str:
    """Return the activation of both encoders; raise ValueError if OpenCLIP has no such architecture."""
    vision, text = config.vision_config, config.text_config
    types = (vision.model_type, text.model_type)
    if types not in (("clip_vision_model", "clip_text_model"), ("amorlip_resnet", "clip_text_model")):
        raise ValueError(
            f"OpenCLIP's CLIP has no place for the encoders {types}; it takes a clip_vision_model or an amorlip_resnet "
            "with a clip_text_model."
        )
    is_resnet = vision.model_type == "amorlip_resnet"
    if config.vision_projection == is_resnet or not config.text_projection:
        raise ValueError(
            f"vision_projection is {config.vision_projection} and text_projection {config.text_projection}; OpenCLIP "
            f"has {not is_resnet} for this vision encoder and True for the text encoder."
        )
    encoders = [text] if is_resnet else [text, vision]
    activations = {encoder.hidden_act for encoder in encoders}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise ValueError(f"hidden_act is {activations}; OpenCLIP has gelu or quick_gelu, the same in both encoders.")
    if any(encoder.layer_norm_eps != 1e-5 for encoder in encoders):
        raise ValueError("layer_norm_eps is not 1e-5, which it is in OpenCLIP.")
    return activations.pop()


def _resnet_cfg(vision) -> dict[str, Any]:
    return {
        "layers": list(vision.depths),
        "width": vision.width,
        "head_width": 32 * vision.width // vision.num_attention_heads,
        "patch_size": None,
    }


def _vit_cfg(vision) -> dict[str, Any]:
    return {
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "patch_size": vision.patch_size,
    }


def to_open_clip_names(model: AmorLIPModel) -> dict[str, Tensor]:
    """Convert the encoders' state dict to OpenCLIP's names and layouts, in float32."""
    table = RESNET_NAMES if model.config.vision_config.model_type == "amorlip_resnet" else VIT_NAMES
    prefixes, parts = ([(ours, theirs) for theirs, ours in names] for names in (table, LAYER_NAMES))
    weights, exported = model.state_dict(), {}
    for name, weight in weights.items():
        if name.startswith("amortizer."):
            continue
        if ".self_attn.q_proj." in name:  # with keys and values, one matrix
            weight = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        name = rename(name, prefixes, parts)
        exported[name] = (weight.T if name in TRANSPOSED else weight).float().contiguous()
    return exported
