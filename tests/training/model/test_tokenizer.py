"""Tokenizers that lack a token which training needs: mended where that is safe, refused with a sentence otherwise."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.runs import build, train
from training.data.collate import Collator, Sample
from training.model.tokenizer import add_padding_token


def make_tokenizer(**special_tokens):
    """Return a tokenizer of words that adds no tokens to a text."""
    vocab = {word: i for i, word in enumerate(["[END]", "[UNK]", "a", "cat", "dog"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special_tokens)


def test_tokenizer_without_padding_token_pads_by_its_end():
    tokenizer = make_tokenizer(eos_token="[END]")
    add_padding_token(tokenizer)
    samples = [Sample(torch.zeros(3, 4, 4), text, i, []) for i, text in enumerate(["a cat", "a"])]
    batch = Collator(tokenizer, 8)(samples)
    assert batch["input_ids"].tolist() == [[2, 3], [2, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    with pytest.raises(UserError, match="no padding token and no end token"):
        add_padding_token(make_tokenizer())


def test_encoder_that_reads_an_end_token_needs_a_tokenizer_that_adds_it(recipe, tmp_path):
    make_tokenizer(eos_token="[END]").save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match=r"end token \(\[END\]\), which the tokenizer does not add"):
        build(recipe(tokenizer=str(tmp_path / "words")))
    make_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no padding token and no end token"):
        build(recipe(tokenizer=str(tmp_path / "bare")))


def test_tokenizer_without_start_token_trains(recipe, tmp_path):
    make_tokenizer(eos_token="[END]").save_pretrained(tmp_path / "words")
    text = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    trainer = train(recipe(tokenizer=str(tmp_path / "words"), text_config=text, max_steps=2, warmup_steps=0))
    assert trainer.state.step == 2 and trainer.processor.tokenizer.pad_token == "[END]"


def test_context_must_hold_more_than_special_tokens(recipe):
    for context in (1, 2):
        config = {"model_type": "clip_text_model", "vocab_size": 700, "hidden_size": 32, "num_attention_heads": 2}
        with pytest.raises(UserError, match=f"max_position_embeddings is {context}, .* adds 2 tokens .* raise it to 3"):
            build(recipe(text_config={**config, "max_position_embeddings": context}))
