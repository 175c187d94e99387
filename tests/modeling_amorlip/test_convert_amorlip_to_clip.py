"""AmorLIP as the CLIP or SigLIP of Transformers: equal embeddings and pipeline scores without code of ours."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel, Siglip2Model, SiglipModel, pipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from modeling_amorlip import AmorLIPConfig, AmorLIPModel, convert_amorlip_to_clip
from modeling_amorlip.convert_amorlip_to_clip import convert_to_transformers
from tests.helpers.checkout import ROOT
from tests.helpers.dual_encoders import assert_same_logits, encoder_config, randomize_biases
from tests.helpers.models import make_model, save_model, save_siglip
from tests.helpers.tasks import run_main
from tests.helpers.towers import make_config, make_inputs


LABELS = ["a red heart", "cat", "two dogs"]


def classify(folder):
    """Classify a picture as Transformers does, by its own pipeline."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    classifier = pipeline(
        "zero-shot-image-classification",
        model=str(folder),
        pipeline_class=ZeroShotImageClassificationPipeline if "clip" in folder.name else None,
    )
    return {answer["label"]: answer["score"] for answer in classifier(image, candidate_labels=LABELS)}


@pytest.mark.parametrize("save, model_class", [(save_model, CLIPModel), (save_siglip, SiglipModel)])
def test_command_writes_what_transformers_knows(save, model_class, tmp_path, monkeypatch, capsys):
    source, output = save(tmp_path / "ours"), tmp_path / "as_clip"
    ours = randomize_biases(AmorLIPModel.from_pretrained(source))
    ours.save_pretrained(source)
    assert run_main(monkeypatch, convert_amorlip_to_clip, "--source", source, "--output", output) == 0
    assert capsys.readouterr().out == f"{model_class.__name__}: {output}\n"
    other = AutoModel.from_pretrained(output, trust_remote_code=False).eval()
    assert type(other) is model_class
    length = ours.config.text_config.max_position_embeddings
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": torch.randint(5, 60, (4, length))}
    assert_same_logits(other, ours, **inputs)
    assert classify(output) == pytest.approx(classify(source), rel=1e-5)
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert not [name for name in files if name.endswith(".py")]
    for path in (ROOT, tmp_path):
        assert not [name for name, content in files.items() if str(path).encode() in content]
    assert b"auto_map" not in files["config.json"]


def test_siglip_of_any_resolution():
    text = encoder_config(32, 2, 2, vocab_size=100, max_position_embeddings=16, pad_token_id=1, projection_size=32)
    vision = encoder_config(32, 2, 2, patch_size=4, num_patches=16)
    config = AmorLIPConfig(
        vision_config={**vision, "model_type": "siglip2_vision_model"},
        text_config={**text, "model_type": "siglip2_text_model"},
        projection_dim=32,
        vision_projection=False,
        text_projection=False,
        logit_bias_init_value=-1.0,
    )
    model = randomize_biases(AmorLIPModel(config))
    other = convert_to_transformers(model)
    assert isinstance(other, Siglip2Model)
    shapes = torch.tensor([[4, 4], [2, 6]])
    assert_same_logits(
        other,
        model,
        pixel_values=torch.randn(2, 16, 48),
        pixel_attention_mask=(torch.arange(16) < shapes.prod(1, keepdim=True)).int(),
        spatial_shapes=shapes,
        input_ids=torch.randint(5, 60, (4, 16)),
    )


def test_logit_bias_of_clip_towers_is_dropped_on_request_only():
    model, _ = make_model(logit_bias_init_value=-3.0)
    with pytest.raises(ValueError, match=r"logit bias \(-3\).*--drop_logit_bias"):
        convert_to_transformers(model)
    other = convert_to_transformers(model, drop_logit_bias=True)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(5, 60, (3, 9))}
    with torch.inference_mode():
        ours, theirs = model(**inputs), other(**inputs)
    torch.testing.assert_close(theirs.text_embeds, ours.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.logits_per_image.softmax(1), ours.logits_per_image.softmax(1))


@pytest.mark.parametrize(
    "towers, fields, message",
    [
        ("dinov2-bert", {}, "no place for the encoders.*dinov2.*bert"),
        ("resnet-clip", {}, "no place for the encoders.*amorlip_resnet"),
        ("clip", {"text_pooling": "mean"}, "text_pooling 'mean'"),
        ("clip", {"vision_pooling": "mean"}, "vision_pooling is 'mean'"),
        ("siglip", {"logit_bias_init_value": -1.0}, "vision_projection is True.*SigLIP of Transformers has False"),
    ],
)
def test_what_neither_has_is_named(towers, fields, message):
    model = AmorLIPModel(make_config(towers, **fields))
    with pytest.raises(ValueError, match=message):
        convert_to_transformers(model)


def test_siglip_towers_without_a_bias_are_refused(tmp_path, monkeypatch, capsys):
    source = save_siglip(tmp_path / "ours", logit_bias_init_value=None)
    assert run_main(monkeypatch, convert_amorlip_to_clip, "--source", source, "--output", tmp_path / "out") == 1
    assert "has no logit bias and scores labels by a softmax" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_precision(tmp_path):
    model = AmorLIPModel(make_config("clip")).bfloat16().eval()
    other = convert_to_transformers(model)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    inputs = make_inputs()
    with torch.inference_mode():
        expected = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        actual = other.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(actual, expected)
