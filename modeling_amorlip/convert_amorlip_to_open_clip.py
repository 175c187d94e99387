"""
An AmorLIP model as OpenCLIP reads it: a folder with `open_clip_config.json` and `open_clip_model.safetensors`.

    python -m modeling_amorlip.convert_amorlip_to_open_clip --source outputs/emoji_clip --output outputs/open_clip

    open_clip.create_model("local-dir:outputs/open_clip")  # the same embeddings; OpenCLIP has no place for the heads
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor


if not __package__:  # run as a file: this folder has a module of the package's name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from modeling_amorlip import AmorLIPModel  # noqa: E402
from modeling_amorlip.convert_clip_to_amorlip import (  # noqa: E402
    LAYER_NAMES,
    RESNET_NAMES,
    TRANSPOSED,
    VIT_NAMES,
    rename,
)


def export_open_clip(model: AmorLIPModel, folder: str | os.PathLike, processor=None) -> None:
    """
    Writes config, weights and, of `processor`, the tokenizer and the normalisation of images.

    Raises:
        ValueError: OpenCLIP has no such encoders; CLIP's ViT or ResNet and CLIP's text encoder can be exported.
    """
    config = open_clip_config(model, processor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(to_open_clip_names(model), folder / "open_clip_model.safetensors")
    if processor is not None:
        processor.tokenizer.save_pretrained(folder)


def open_clip_config(model: AmorLIPModel, processor=None) -> dict:
    """The content of `open_clip_config.json`."""
    config = model.config
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
    transformers = [text] if is_resnet else [text, vision]
    activations = {encoder.hidden_act for encoder in transformers}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise ValueError(f"hidden_act is {activations}; OpenCLIP has gelu or quick_gelu, the same in both encoders.")
    if any(encoder.layer_norm_eps != 1e-5 for encoder in transformers):
        raise ValueError("layer_norm_eps is not 1e-5, which it is in OpenCLIP.")
    if is_resnet:
        vision_cfg = {
            "layers": list(vision.depths),
            "width": vision.width,
            "head_width": 32 * vision.width // vision.num_attention_heads,
            "patch_size": None,
        }
    else:
        vision_cfg = {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
        }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    # Texts are read where their highest token stands, CLIP's end of text; so says eos_token_id 2 in old checkpoints.
    if text.eos_token_id not in (2, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
    if processor is not None:
        text_cfg["hf_tokenizer_name"] = "."  # OpenCLIP looks into the folder itself
        preprocess_cfg |= {name: list(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std")}
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {"image_size": vision.image_size, **vision_cfg},
        "text_cfg": text_cfg,
    }
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = model.logit_bias.item()
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def to_open_clip_names(model: AmorLIPModel) -> dict[str, Tensor]:
    """The encoders' state dict with OpenCLIP's names and layouts, in float32."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder or name on the Hub of an AmorLIP model")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        model = AutoModel.from_pretrained(arguments.source, dtype=torch.float32)
        if not isinstance(model, AmorLIPModel):
            raise ValueError(f"{arguments.source} is a {type(model).__name__}; an AmorLIPModel is needed.")
        try:
            processor = AutoProcessor.from_pretrained(arguments.source)
        except (OSError, ValueError):
            processor = None
        export_open_clip(model, arguments.output, processor)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f'open_clip.create_model("local-dir:{arguments.output}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
