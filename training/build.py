"""Builds what a run consists of from its configuration."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, CLIPProcessor

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.model.tokenizer import _build_tokenizer


def build_model(arguments: PretrainConfig, captions, resumed: Path | None = None):
    """(model, processor) of a run.

    Args:
        captions: texts to train a tokenizer on when none is named.
        resumed: folder of the run that is continued, whose tokenizer is taken whatever the captions are by now.
    """
    if arguments.model:
        try:
            model = AutoModel.from_pretrained(arguments.model)
            processor = AutoProcessor.from_pretrained(arguments.model)
        except (OSError, ValueError) as error:
            raise UserError(f"model {arguments.model} cannot be loaded: {error}") from None
        if not isinstance(model, AmorLIPModel):
            raise UserError(f"model {arguments.model} is a {type(model).__name__}; an AmorLIPModel is needed.")
        return model, processor
    tokenizer = _build_tokenizer(str(resumed) if resumed else arguments.tokenizer, arguments, captions)
    # A tokenizer trained here may find fewer tokens than allowed: the embedding table has just what is used.
    text_config = dict(arguments.text_config)
    text_config |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    initial = {name: getattr(arguments, name) for name in ("logit_scale_init_value", "logit_bias_init_value")}
    try:
        config = AmorLIPConfig(
            vision_config=arguments.vision_config,
            text_config=text_config,
            amortizer_config=arguments.amortizer_config,
            projection_dim=arguments.projection_dim,
            **{name: value for name, value in initial.items() if value is not None},
        )
        model = AmorLIPModel(config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"The model cannot be built: {error.__cause__ or error}") from None
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return model, CLIPProcessor(image_processor, tokenizer)
