"""The model and its processor for a run: continued from a folder or the Hub, or fresh with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from eval.errors import UserError
from modeling_amorlip import AmorLIPConfig, AmorLIPModel

from .arguments import PretrainArguments


START, END = "<|startoftext|>", "<|endoftext|>"


def build_model(arguments: PretrainArguments, captions, resumed: Path | None = None):
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


def _build_tokenizer(source: str | None, arguments: PretrainArguments, captions):
    if source:
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer {source} cannot be loaded: {error}") from None
    return train_tokenizer(captions, arguments.text_config.get("vocab_size", 49408))


def train_tokenizer(captions, vocab_size: int) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's form (lower-cased, end-of-word marks, start and end tokens) trained on captions.

    Raises:
        UserError: `vocab_size` leaves no room for merges beside the bytes and the two special tokens.
    """
    characters = sorted(ByteLevel.alphabet())
    smallest = 2 * len(characters) + 2
    if vocab_size <= smallest:
        raise UserError(f"text_config.vocab_size is {vocab_size}; a tokenizer trained here needs more than {smallest}.")
    backend = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    # Every byte is a token in both forms, inside a word and at its end, so that any text can be encoded. Listing them
    # all beforehand also fixes their order, which the trainer would take from a hash map, another in every process.
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, *characters, *(f"{character}</w>" for character in characters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=backend.get_vocab(), merges=merges)


class PairEncoder(nn.Module):
    """What is wrapped for distribution: pixels and tokens in, unit-norm embeddings and the logit scale out.

    The amortizer stays outside: the objective fits it on detached embeddings with an optimiser of its own.
    """

    def __init__(
        self, model: AmorLIPModel, image_mean: list[float], image_std: list[float], freeze: Iterable[str] = (),
        patch_dropout: float = 0.0, text_groups: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.model, self.text_groups = model, text_groups
        model.amortizer.requires_grad_(False)
        self.frozen = [{"vision": model.vision_model, "text": model.text_model}[name] for name in freeze]
        for encoder in self.frozen:
            encoder.requires_grad_(False)
        if patch_dropout:
            _drop_patches(model.vision_model, patch_dropout)
        self.mean = nn.Buffer(255 * torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> PairEncoder:
        """As any module's, but frozen encoders, and statistics of frozen batch normalisations, stay as they are."""
        super().train(mode)
        for encoder in self.frozen:
            encoder.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.train(mode and module.weight.requires_grad)
        return self

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, lengths: list[int] | None = None
    ):
        """Pixels and tokens to what a loss needs.

        Args:
            pixel_values: uint8 [N, 3, H, W]. input_ids, attention_mask: [N, length].
            lengths: tokens that each text needs, for encoding texts in groups of similar length.

        Returns:
            (image_embeds [N, d], text_embeds [N, d], scale [], bias [] or None).
        """
        pixels = (pixel_values.float() - self.mean) / self.std
        image_embeds = self.model.get_image_features(pixels).pooler_output
        if lengths is None or self.text_groups == 1:
            text_embeds = self.model.get_text_features(input_ids, attention_mask).pooler_output
        else:
            text_embeds = self._encode_by_length(input_ids, attention_mask, lengths)
        return (
            nn.functional.normalize(image_embeds.float(), dim=-1),
            nn.functional.normalize(text_embeds.float(), dim=-1),
            self.model.logit_scale.exp(),
            self.model.logit_bias,
        )

    def _encode_by_length(self, input_ids: Tensor, attention_mask: Tensor, lengths: list[int]) -> Tensor:
        """Text embeddings [N, d], each group padded to its own longest. Nothing is read from the device."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows, parts = torch.tensor(order, device=input_ids.device), []
        for group in torch.arange(len(order)).tensor_split(self.text_groups):
            if len(group):
                chosen, longest = rows[group[0] : group[-1] + 1], lengths[order[group[-1]]]
                tokens, mask = input_ids[chosen, :longest], attention_mask[chosen, :longest]
                parts.append(self.model.get_text_features(tokens, mask).pooler_output)
        embeds = torch.cat(parts)
        return torch.empty_like(embeds).index_copy(0, rows, embeds)


def _drop_patches(vision_model: nn.Module, share: float) -> None:
    """Leaves out a random share of patches, others for each image, in training (Li et al. 2023, FLIP).

    Raises:
        UserError: the encoder has no `embeddings` that put a class token before the patches.
    """
    vision_model = getattr(vision_model, "vision_model", vision_model)
    embeddings = getattr(vision_model, "embeddings", None)
    if not any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")):
        kind = type(vision_model).__name__
        raise UserError(f"patch_dropout: a {kind} has no class token beside patches; set it to 0.")

    def drop(module: nn.Module, inputs, embeds: Tensor) -> Tensor:
        if not module.training:
            return embeds
        patches = embeds[:, 1:]
        kept = max(1, round(patches.shape[1] * (1 - share)))
        chosen = torch.rand(patches.shape[:2], device=embeds.device).topk(kept).indices
        patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([embeds[:, :1], patches], dim=1)

    embeddings.register_forward_hook(drop)
