"""The tokenizer of a run: loaded, or trained on the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.cli_amorlip import UserError


START, END = "<|startoftext|>", "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 49408


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {source} cannot be loaded: {error}") from None


def add_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer pad by its end token if it has no token to pad with.

    Raises:
        UserError: it has no end token either.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no padding token and no end token: set pad_token in its folder.")
    tokenizer.pad_token = tokenizer.eos_token


def check_context(tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raise `UserError` if a text encoder reads no tokens but those that the tokenizer adds to every text."""
    num_special = tokenizer.num_special_tokens_to_add()
    if context <= num_special:
        raise UserError(
            f"text_config.max_position_embeddings is {context}, and the tokenizer adds {num_special} tokens to every "
            f"text: raise it to {num_special + 1} at least."
        )


def check_end_token(tokenizer: PreTrainedTokenizerBase, config: AmorLIPConfig) -> None:
    """Raise `UserError` if a text encoder reads texts at an end token that the tokenizer does not add."""
    reads_end = config.text_pooling == "eos" or cast(Any, config.text_config).model_type == "clip_text_model"
    if reads_end and tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise UserError(
            f"The text encoder reads a text at the tokenizer's end token ({tokenizer.eos_token}), which the tokenizer "
            "does not add to texts: name a tokenizer that does, or another text encoder."
        )


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """Train a byte-level BPE of CLIP's form (lower case, end-of-word marks, start and end tokens) on captions.

    Raises:
        UserError: `vocab_size` leaves no room for merges besides the bytes and the two special tokens.
    """
    characters = sorted(ByteLevel.alphabet())
    num_reserved = 2 * len(characters) + 2
    if vocab_size <= num_reserved:
        raise UserError(
            f"text_config.vocab_size is {vocab_size}; a tokenizer that is trained here needs more than {num_reserved}."
        )
    backend = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    # Every byte is a token in both forms, inside a word and at its end, so that any text can be encoded. Listing them
    # beforehand also fixes their order, which the trainer takes from a hash map that differs between processes.
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, *characters, *(f"{character}</w>" for character in characters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=backend.get_vocab(), merges=merges)  # type: ignore[arg-type]  # pairs are what it takes
