"""A tiny dual encoder with its processor, untrained."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipProcessor,
)

from modeling_amorlip import AmorLIPConfig, AmorLIPModel


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONTEXT = 32


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's form with a token per character."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CONTEXT)


def make_model(seed: int = 0, **changes) -> tuple[AmorLIPModel, CLIPProcessor]:
    tokenizer = make_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    defaults = {
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
        "text_config": {**TOWER, **text, "model_type": "clip_text_model"},
        "projection_dim": 16,
    }
    config = AmorLIPConfig(**{**defaults, **changes})
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, do_convert_rgb=True)
    return AmorLIPModel(config).eval(), CLIPProcessor(image_processor, tokenizer)


def save_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Write the model and its processor into a folder, as training does."""
    model, processor = make_model(seed, **changes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_siglip(folder: Path, **changes) -> Path:
    """Write a model with SigLIP's towers, logit bias and processor into a folder, its texts without masks."""
    words = ["[UNK]", "[PAD]", *string.ascii_lowercase, "red", "heart", "cat", "two", "dogs"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_input_names=["input_ids"]
    )
    text = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 1, "projection_size": 32}
    fields = {"projection_dim": 32, "vision_projection": False, "text_projection": False}
    torch.manual_seed(0)
    config = AmorLIPConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16},
        text_config={**TOWER, **text, "model_type": "siglip_text_model"},
        **{**fields, "logit_bias_init_value": -1.0, **changes},
    )
    AmorLIPModel(config).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
