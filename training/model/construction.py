"""Build the model and its processor: pretrained, or fresh with a tokenizer that is loaded or trained on captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from training.config import ModelConfig, OptimizationConfig, PretrainConfig
from training.data.mixture import Mixture
from training.model.lora import add_adapters, save_adapted
from training.model.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    add_padding_token,
    check_context,
    check_end_token,
    load_tokenizer,
    train_tokenizer,
)
from training.run.checkpointing import find_processor
from training.run.processes import run_on_main


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class TrainingModel:
    """A model with what training needs besides it.

    Args:
        model: the model; with adapters, its layers hold them.
        processor: images and texts to tensors.
        adapted: PEFT's wrapper of `model`; None without adapters.
        image_size: height and width of the images that the processor makes.
        context: length of the longest text.
    """

    model: AmorLIPModel
    processor: ProcessorMixin
    adapted: PeftModel | None
    image_size: int
    context: int

    def save(self, folder: Path) -> None:
        """Save model and processor for `AutoModel.from_pretrained`; adapters are merged, and kept in `adapter/`."""
        if self.adapted is None:
            self.model.save_pretrained(folder)
        else:
            save_adapted(self.adapted, folder)
        self.processor.save_pretrained(folder)


def build_model(
    config: PretrainConfig, accelerator: Accelerator, pairs: Mixture, checkpoint: Path | None = None
) -> TrainingModel:
    """Build the model of a run.

    Args:
        config: settings of the model and the run.
        accelerator: shares a tokenizer that is trained here with all processes.
        pairs: data whose captions a tokenizer is trained on.
        checkpoint: checkpoint that is resumed, whose tokenizer is used whatever the captions are by now.

    Raises:
        UserError: the model cannot be loaded or built, or does not fit the other settings.
    """
    if config.model:
        model, processor = load_pretrained(config.model)
    else:
        tokenizer = choose_tokenizer(config, accelerator, pairs, checkpoint)
        add_padding_token(tokenizer)
        model, processor = build_fresh_model(config, tokenizer)
        check_end_token(tokenizer, model.config)
    add_padding_token(processor.tokenizer)
    check_context(processor.tokenizer, model.config.text_config.max_position_embeddings)
    adapted = add_adapters(model, config.lora, config.freeze) if config.lora else None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    check_micro_batches(model, config)
    image_size = find_image_size(model, processor, config)
    return TrainingModel(model, processor, adapted, image_size, model.config.text_config.max_position_embeddings)


def choose_tokenizer(
    config: PretrainConfig, accelerator: Accelerator, pairs: Mixture, checkpoint: Path | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a fresh model: the resumed run's, the one that is named, or one trained on captions."""
    if checkpoint is not None:
        return load_tokenizer(find_processor(checkpoint, Path(config.output_dir)))
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    vocab_size = config.text_config.get("vocab_size", DEFAULT_VOCAB_SIZE)
    return run_on_main(accelerator, lambda: train_tokenizer(pairs.captions(), vocab_size))


def load_pretrained(name: str) -> tuple[AmorLIPModel, ProcessorMixin]:
    """Load a model and its processor from a folder or the Hub.

    Raises:
        UserError: it cannot be loaded, or is not an `AmorLIPModel`.
    """
    try:
        model = AutoModel.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name} cannot be loaded: {error}") from None
    if not isinstance(model, AmorLIPModel):
        raise UserError(f"model {name} is a {type(model).__name__}; an AmorLIPModel is needed.")
    return model, processor


def build_fresh_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[AmorLIPModel, ProcessorMixin]:
    """Return a model with fresh weights for a tokenizer, and its processor.

    Raises:
        UserError: the model's configuration is wrong.
    """
    # A tokenizer trained here may find fewer tokens than allowed: the embedding table has just those that occur.
    text_config = config.text_config | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    initial = {name: getattr(config, name) for name in ("logit_scale_init_value", "logit_bias_init_value")}
    try:
        model_config = AmorLIPConfig(
            vision_config=config.vision_config,
            text_config=text_config,
            amortizer_config=config.amortizer_config,
            projection_dim=config.projection_dim,
            **{name: value for name, value in initial.items() if value is not None},
        )
        model = AmorLIPModel(model_config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"The model cannot be built: {error.__cause__ or error}") from None
    text, vision = cast(Any, model_config.text_config), cast(Any, model_config.vision_config)
    tokenizer.model_max_length, size = text.max_position_embeddings, vision.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return model, CLIPProcessor(image_processor, tokenizer)


def check_micro_batches(model: AmorLIPModel, config: OptimizationConfig) -> None:
    """Raise `UserError` if micro-batches would change the result because the model has batch normalization."""
    if config.micro_batch_size and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise UserError(
            f"micro_batch_size {config.micro_batch_size}: this model's batch normalization would see parts of the "
            "batch, which changes the result. Leave micro_batch_size out, or choose encoders without it."
        )


def find_image_size(model: AmorLIPModel, processor: ProcessorMixin, config: ModelConfig) -> int:
    """Return the height and width of the images that the processor makes.

    Raises:
        UserError: the image encoder expects another size.
    """
    image_processor = processor.image_processor
    shape = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
    image_size = shape["height"] if "height" in shape else shape["shortest_edge"]
    expected_size = getattr(model.config.vision_config, "image_size", image_size)
    if image_size != expected_size:
        raise UserError(
            f"The processor of {config.model} makes images of {image_size} pixels, "
            f"its vision_config.image_size is {expected_size}; make them equal."
        )
    return image_size
