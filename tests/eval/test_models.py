"""Models that are loaded, refused, and told apart."""

import json

import pytest
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from eval.identity import is_of_model, model_identity
from eval.models import identify_model, load_model, revision, weight_files
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.models import make_tokenizer, save_model


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_identity_changes_with_each_part(tmp_path):
    first = save_model(tmp_path / "a")
    record = identify_model(str(first), *load_model(str(first)))
    assert record.revision == record.weights[:12] and revision(str(first), None).startswith(record.revision)
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


def test_identity_changes_with_the_configuration(tmp_path):
    """Equal weights compute something else with another activation; where a folder came from changes nothing."""
    folder = save_model(tmp_path / "a")
    record, reused = identify_model(str(folder), *load_model(str(folder))), revision(str(folder), None)
    config = json.loads((folder / "config.json").read_text())
    for changes, is_same in (({"transformers_version": "5.0.0", "_name_or_path": "/elsewhere"}, True), ({}, False)):
        config |= changes
        config["text_config"]["hidden_act"] = config["text_config"]["hidden_act"] if is_same else "relu"
        (folder / "config.json").write_text(json.dumps(config))
        again = identify_model(str(folder), *load_model(str(folder)))
        assert again.weights == record.weights
        assert (again == record, is_of_model(model_identity(record), again)) == (is_same, is_same)
        assert (revision(str(folder), None) == reused) is is_same


def test_only_files_that_are_loaded_count_as_weights(tmp_path):
    folder = save_model(tmp_path / "a")
    before = weight_files(folder)
    for name in ("model_ema.safetensors", "model-00001-of-00002.safetensors", "pytorch_model_old.bin"):
        (folder / name).write_bytes(b"other")
    assert weight_files(folder) == before == [folder / "model.safetensors"]
    model, _ = load_model(str(folder))
    before[0].unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model-old.safetensors").write_bytes(b"other")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {path.name for path in weight_files(folder)}
    assert len(names) > 1 and names == set(index["weight_map"].values())


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
