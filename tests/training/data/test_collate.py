"""Texts are padded to the batch, and grouping texts by length changes no result."""

import pytest
import torch

from tests.helpers.runs import build
from training.data.collate import Collator, Sample
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
