"""Collate samples into a batch of tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


WORD = re.compile(r"\S+")
MIN_WORD = 1000


class BadSample(TypedDict):
    """A pair that could not be used, and why."""

    key: str
    shard: str
    cause: str
    reason: str


class Sample(NamedTuple):
    """One decoded pair, with the pairs that failed before it."""

    image: Tensor
    caption: str
    sample_id: int
    bad_samples: list[BadSample]


class Collator:
    """Collate samples into a dictionary that the encoder and the trainer read.

    The dictionary holds `pixel_values` (uint8 [N, 3, H, W]), `input_ids` and `attention_mask` (int64 [N, L]),
    `lengths` (N integers: the length that each text would be padded to on its own), `sample_ids` (int64 [N]) and
    `bad_samples`. When a pair has no replacement, the dictionary holds only `bad_samples`.

    Args:
        tokenizer: converts captions to tokens. If it returns no attention mask (as SigLIP's does), its encoder reads
            padding as text, so every text is padded to `max_length`.
        max_length: context length of the text encoder; longer texts are truncated.
        multiple: texts are padded to the longest of the batch, rounded up to this multiple; -1 pads to `max_length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, multiple: int = 1):
        self.has_masks = "attention_mask" in tokenizer.model_input_names
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.multiple = multiple if self.has_masks else -1
        self.max_word = max(MIN_WORD, 2 * max_length * max(map(len, tokenizer.get_vocab()), default=1))

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        bad_samples = [entry for sample in samples for entry in sample.bad_samples]
        if any(sample.image.numel() == 0 for sample in samples):
            return {"bad_samples": bad_samples}
        captions = [shorten_text(sample.caption, self.max_length, self.max_word) for sample in samples]
        text = self.tokenizer(captions, truncation=True, max_length=self.max_length)
        lengths = [self._padded_length(len(tokens)) for tokens in text["input_ids"]]
        text = self.tokenizer.pad(
            text, padding="max_length", max_length=max(lengths), padding_side="right", return_tensors="pt"
        )
        return {
            "pixel_values": torch.stack([sample.image for sample in samples]),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"] if self.has_masks else torch.ones_like(text["input_ids"]),
            "lengths": lengths,
            "sample_ids": torch.tensor([sample.sample_id for sample in samples]),
            "bad_samples": bad_samples,
        }

    def _padded_length(self, length: int) -> int:
        if self.multiple < 0:
            return self.max_length
        return min(math.ceil(length / self.multiple) * self.multiple, self.max_length)


def shorten_text(text: str, max_words: int, max_word: int) -> str:
    """Return the beginning of a long text, which takes a tokenizer less time than the whole.

    Every word gives a token at least, so that words after the first `max_words` give none that are kept. Letters beyond
    `max_word` in a word without spaces belong to tokens far behind those that are kept.

    Args:
        text: a caption.
        max_words: words with a letter or a digit that are kept.
        max_word: characters that are kept of a word; shorter texts are returned as they are.
    """
    if len(text) <= max_word:
        return text
    parts, end, num_words = [], 0, 0
    for word in WORD.finditer(text):
        shortened = word[0][:max_word]
        parts += [text[end : word.start()], shortened]
        end = word.end()
        num_words += any(character.isalnum() for character in shortened)
        if num_words == max_words:
            break
    return "".join(parts)
