"""The tokenizer of a run: loaded, or trained on its captions."""

from __future__ import annotations

import json

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, CLIPTokenizer

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig


START, END = "<|startoftext|>", "<|endoftext|>"


def _build_tokenizer(source: str | None, arguments: PretrainConfig, captions):
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
