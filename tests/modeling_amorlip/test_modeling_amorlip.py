"""The model as Transformers' users meet it: configuration, Auto classes, precision, wrong input."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    GPT2Config,
    pipeline,
)

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from tests.helpers.checkout import TINY
from training.model.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AmorLIPModel(make_config()).eval()


def make_config(**changes):
    text = {**TINY["text_config"], "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    fields = {"vision_config": TINY["vision_config"], "text_config": text, "projection_dim": 32}
    return AmorLIPConfig(**fields | changes)


@pytest.fixture(scope="module")
def processor(demo_rows):
    tokenizer = train_tokenizer(demo_rows["caption"], 700)
    size = {"height": 32, "width": 32}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, do_convert_rgb=True), tokenizer)


@pytest.fixture(scope="module")
def inputs(demo_rows, processor):
    rows = demo_rows.select([0, 500, 1000])
    return processor(images=list(rows["image"]), text=list(rows["caption"]), padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_outputs(model, inputs):
    outputs = model(**inputs, return_loss=True)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(outputs.logits_per_image, scale * outputs.image_embeds @ outputs.text_embeds.T)
    torch.testing.assert_close(outputs.logits_per_text, outputs.logits_per_image.T)
    labels, cross_entropy = torch.arange(3), torch.nn.functional.cross_entropy
    expected = (cross_entropy(outputs.logits_per_image, labels) + cross_entropy(outputs.logits_per_text, labels)) / 2
    torch.testing.assert_close(outputs.loss, expected)
    expected = outputs.logits_per_image - outputs.log_partition_per_image[:, None]
    torch.testing.assert_close(model.log_prob_per_image(outputs), expected)
    assert model.log_prob_per_text(outputs).shape == (3, 3)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    with pytest.raises(ValueError, match="pixel_values is None"):
        model(input_ids=inputs["input_ids"], return_loss=True)


def test_different_numbers_of_images_and_texts(model, inputs):
    outputs = model(inputs["input_ids"], inputs["pixel_values"][:2], inputs["attention_mask"])
    assert outputs.logits_per_image.shape == (2, 3) and outputs.logits_per_text.shape == (3, 2)


def test_padding_further_changes_nothing(model, processor):
    texts = ["red heart", "woman and man holding hands"]
    longest = processor.tokenizer(texts, padding=True, return_tensors="pt")
    context = processor.tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")
    assert longest["input_ids"].shape[1] < context["input_ids"].shape[1]
    a, b = (model.get_text_features(**tokens).pooler_output for tokens in (longest, context))
    torch.testing.assert_close(a, b)


def test_inputs_that_would_be_cut_or_ignored_are_refused(model, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"attention_mask is \[3, \d+\], input_ids is \[3, \d+\]"):
        model(input_ids=ids, attention_mask=mask[:, :-1])
    embeds = model.get_input_embeddings()(ids)
    for other in ({"input_ids": ids}, {"pixel_values": inputs["pixel_values"]}):
        with pytest.raises(ValueError, match="inputs_embeds is not supported"):
            model(**other, inputs_embeds=embeds)
    assert model(**inputs, inputs_embeds=None).logits_per_image.shape == (3, 3)  # as PEFT calls models


def test_configurations_of_encoders_are_left_untouched():
    text = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16, dtype="float16")
    before = text.to_dict()
    AmorLIPModel(make_config(text_config=text))
    assert text.to_dict() == before and text.use_cache and text._attn_implementation is None


def test_auto_classes_and_round_trip(model, folder, inputs):
    assert isinstance(AutoConfig.from_pretrained(folder), AmorLIPConfig)
    assert isinstance(AutoProcessor.from_pretrained(folder), CLIPProcessor)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto.from_pretrained(folder)
        assert isinstance(loaded, AmorLIPModel) and not loaded.training
        assert torch.equal(loaded(**inputs).image_embeds, model(**inputs).image_embeds)


def test_zero_shot_pipeline(folder, demo_rows):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["red heart", "a cat", "airplane"]
    found = classify(demo_rows[0]["image"].convert("RGB"), candidate_labels=labels)
    assert {answer["label"] for answer in found} == set(labels)
    assert sum(answer["score"] for answer in found) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, inputs, dtype):
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    assert model.visual_projection.weight.dtype == dtype
    assert model.logit_scale.dtype == torch.float32
    assert {p.dtype for p in model.amortizer.parameters()} == {torch.float32}
    whole = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(model(**inputs).logits_per_image, whole(**inputs).logits_per_image, rtol=0, atol=0.3)


def test_a_checkpoint_without_amortizer_loads_with_fresh_heads(folder, tmp_path, inputs, caplog):
    weights = load_file(folder / "model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.startswith("amortizer")}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded(**inputs).log_partition_per_image.isfinite().all()
    assert torch.equal(loaded.visual_projection.weight, weights["visual_projection.weight"])
    bound = loaded.amortizer.image_head.fc1.in_features**-0.5
    assert 0 < loaded.amortizer.image_head.fc1.weight.abs().max() <= bound
    assert torch.equal(loaded.amortizer.image_head.norm1.weight, torch.ones(16))


def test_initialisation(model):
    assert model.logit_scale.item() == pytest.approx(2.6592)
    assert model.visual_projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.15)
    fresh = AmorLIPModel(make_config(logit_bias_init_value=-10.0))
    assert fresh.logit_bias.item() == -10.0


def test_other_towers(inputs):
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    outputs = AmorLIPModel(make_config(vision_config=vision))(**inputs)
    assert outputs.image_embeds.shape == (3, 32)


def test_wrong_image_size_is_named(model):
    with pytest.raises(ValueError, match="48.*32"):
        model.get_image_features(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"projection_dim": "32"}, "'projection_dim' expected int, got str"),
        ({"projection_dim": None}, "'projection_dim' expected int, got NoneType"),
        ({"logit_scale_init_value": "2.6"}, "'logit_scale_init_value' with value '2.6'"),
        ({"vision_config": {"model_type": "amorlip_resnet", "width": 64.0}}, "'width' expected int, got float"),
        ({"amortizer_config": {"size": "8"}}, "'size' expected int, got str"),
        ({"amortizer_config": {"head_type": "mlp"}}, "head_type is 'mlp'.*residual_mlp"),
        ({"amortizer_config": {"width_factor": -1}}, "width_factor is -1"),
        ({"vision_config": {"image_size": 224, "patch_size": 15}}, "Use image_size 210 or 225"),
        ({"vision_config": {"model_type": "nothing"}}, "vision_config.model_type is 'nothing'"),
    ],
)
def test_wrong_configurations_name_field_value_and_way_out(changes, message):
    with pytest.raises(Exception, match=message):
        AmorLIPConfig(**changes)


def test_loading_says_nothing_of_a_complete_checkpoint(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoModel.from_pretrained(folder)
    assert not [warning for warning in caught if "amortizer" in str(warning.message)]
    assert os.path.exists(folder / "model.safetensors")
