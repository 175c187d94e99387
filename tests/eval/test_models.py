"""Models that are loaded, refused, and told apart."""

import pytest
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from eval.models import identify_model, load_model, revision
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.models import make_tokenizer, save_model


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_identity_changes_with_each_part(tmp_path):
    first = save_model(tmp_path / "a")
    record = identify_model(str(first), *load_model(str(first)))
    assert record.revision == record.weights[:12] == revision(str(first), None)
    again = identify_model(str(first), *load_model(str(first)))
    assert again == record
    other = identify_model(str(first), *load_model(str(save_model(tmp_path / "b", seed=1))))
    assert (other.processor, other.tokenizer, other.parameters) == (
        record.processor,
        record.tokenizer,
        record.parameters,
    )
    model, processor = load_model(str(first))
    processor.tokenizer(["a", "ab"], padding=True, truncation=True, max_length=5)  # leaves its traces in the tokenizer
    assert identify_model(str(first), model, processor) == record
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    processor.tokenizer.add_tokens(["new"])
    changed = identify_model(str(first), model, processor)
    assert changed.processor != record.processor and changed.tokenizer != record.tokenizer
    assert changed.weights == record.weights


def test_model_that_is_no_dual_encoder_is_refused(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    BertModel(BertConfig(**SMALL, vocab_size=50)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    for name, kind in (("vit", "ViTModel"), ("bert", "BertModel")):
        with pytest.raises(UserError, match=f"is a {kind} without .*; name a dual encoder"):
            load_model(str(tmp_path / name))


def test_model_without_processor_is_refused(tmp_path):
    folder = save_model(tmp_path / "a")
    for path in folder.glob("*processor*.json"):
        path.unlink()
    with pytest.raises(UserError, match="processor"):
        load_model(str(folder))


def test_missing_folder_is_named():
    for name in ("/nowhere/model", "./nowhere", "~/nowhere/at/all"):
        with pytest.raises(UserError, match="there is no such folder"):
            load_model(name)
