"""Texts are padded to the batch, and grouping texts by length changes no result."""

import pytest
import torch

from tests.helpers.runs import build
from training.data.collate import Collator, Sample, shorten_text
from training.model.tokenizer import train_tokenizer


def test_texts_are_padded_to_the_batch():
    tokenizer = train_tokenizer(["a cat", "a dog and a cat"], 520)
    samples = [Sample(torch.zeros(3, 4, 4), text, i, []) for i, text in enumerate(["a", "a dog and a cat"])]
    lengths = {}
    for multiple in (1, 8, -1):
        batch = Collator(tokenizer, 40, multiple)(samples)
        lengths[multiple] = batch["input_ids"].shape[1]
        expected = [len(tokenizer(sample.caption)["input_ids"]) for sample in samples]
        assert batch["attention_mask"].sum(1).tolist() == expected
    longest = len(tokenizer("a dog and a cat")["input_ids"])
    assert lengths == {1: longest, 8: -(-longest // 8) * 8, -1: 40}


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_grouped_texts_have_the_same_embeddings_and_gradients(recipe, groups):
    trainer = build(recipe())
    encoder, batch = trainer.encoder.eval(), next(iter(trainer.dataloader))
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "lengths")}
    assert len(set(batch["lengths"])) > 3
    results = []
    for encoder.text_groups in (1, groups):
        encoder.zero_grad()
        images, texts, scale, _ = encoder(**inputs)
        (scale * images @ texts.T).softmax(1).diagonal().sum().backward()
        results.append([texts, *(p.grad.clone() for p in encoder.model.text_model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


LONG_TEXTS = {
    "many words": "a dog and a cat " * 5000,
    "one word": "dogcat" * 15_000,
    "one letter": "a" * 90_000,
    "long words": " ".join(["cat" * 3000, "dog" * 3000, "and a cat"] * 30),
    "spaces": "a" + " " * 90_000 + "cat" + "\n" * 50_000 + "dog",
    "marks": "! " * 40_000 + "a cat",
    "letters without spaces": "猫と犬" * 20_000,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_long_texts_keep_their_first_tokens(text):
    tokenizer = train_tokenizer(["a cat", "a dog and a cat", "cat " * 10] * 5, 540)
    collator = Collator(tokenizer, 40)
    shortened = shorten_text(text, collator.max_length, collator.max_word)
    assert tokenizer(shortened, truncation=True, max_length=40) == tokenizer(text, truncation=True, max_length=40)
    assert len("".join(shortened.split())) <= max(40 * collator.max_word, 90_000)
    assert shorten_text("short  text\n", 1, 20) == "short  text\n"


def test_long_words_are_cut():
    assert shorten_text(f"{'x' * 5000} y {'z' * 3000} ! a b", 3, 1000) == f"{'x' * 1000} y {'z' * 1000}"
