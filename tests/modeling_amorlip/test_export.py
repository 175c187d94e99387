"""A model outside of PyTorch: ONNX in onnxruntime, and `torch.export`, against the model itself."""

import json

import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from modeling_amorlip import AmorLIPConfig, AmorLIPModel, export_amorlip, onnx_amorlip
from modeling_amorlip.export_amorlip import export, write_config
from tests.helpers.checkout import TINY
from tests.helpers.models import save_model
from tests.helpers.tasks import run_main


pytestmark = pytest.mark.e2e  # an export takes long
slow = pytest.mark.slow
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"vocab_size": 700, "max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
CLIP = {"vision_config": TINY["vision_config"], "text_config": {**TINY["text_config"], **WORDS}}
RESNET = {"model_type": "amorlip_resnet", "width": 8, "depths": [1, 1, 1, 1], "num_attention_heads": 4}
TOWERS = {
    "clip": CLIP,
    "siglip": {
        "vision_config": {**SMALL, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16},
        "text_config": {**SMALL, **WORDS, "model_type": "siglip_text_model", "projection_size": 32},
        "logit_bias_init_value": -3.0,
    },
    "dinov2-bert": {
        "vision_config": {**SMALL, "model_type": "dinov2", "image_size": 32, "patch_size": 16},
        "text_config": {**SMALL, **WORDS, "model_type": "bert"},
    },
    "resnet-causal": {
        "vision_config": {**RESNET, "image_size": 32, "output_dim": 24},
        "text_config": {**SMALL, **WORDS, "model_type": "qwen2", "num_key_value_heads": 1},
    },
}
TEXT_SIZES = [(1, 5), (3, 5), (64, 5), (1, 77), (64, 77)]


def make_model(name):
    torch.manual_seed(0)
    return AmorLIPModel(AmorLIPConfig(**TOWERS[name], projection_dim=32)).eval()


def make_tokens(batch, length):
    """Texts of all lengths up to `length`, every other one padded on the left."""
    ids = torch.randint(2, 700, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        tokens = 1 + row % length
        padding = slice(tokens, None) if row % 2 else slice(0, length - tokens)
        ids[row, padding], mask[row, padding] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def expected_embeds(model, pixels=None, tokens=None):
    with torch.inference_mode():
        features = model.get_image_features(pixels) if tokens is None else model.get_text_features(**tokens)
    return torch.nn.functional.normalize(features.pooler_output, dim=-1)


def run_session(path, outputs, **inputs):
    values = onnxruntime.InferenceSession(path).run(outputs, {name: value.numpy() for name, value in inputs.items()})
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize("name", [name if name == "siglip" else pytest.param(name, marks=slow) for name in TOWERS])
def test_onnx_in_onnxruntime(name, tmp_path):
    """Embeddings and probabilities of any number of images and texts, of any length; SigLIP's without a mask."""
    model, has_mask = make_model(name), name != "siglip"
    paths = export(model, tmp_path, has_mask=has_mask)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"onnx/{part}.onnx" for part in ("model", "vision_model", "text_model")
    ]
    close = {"rtol": 0, "atol": 1e-5}
    for batch in (1, 3, 64):
        pixels = torch.randn(batch, 3, 32, 32)
        (embeds,) = run_session(paths[1], ["image_embeds"], pixel_values=pixels)
        torch.testing.assert_close(embeds, expected_embeds(model, pixels), **close)
    for batch, length in TEXT_SIZES if has_mask else [(1, 77), (64, 77)]:
        tokens = make_tokens(batch, length)
        tokens = tokens if has_mask else {"input_ids": tokens["input_ids"]}
        (embeds,) = run_session(paths[2], ["text_embeds"], **tokens)
        torch.testing.assert_close(embeds, expected_embeds(model, tokens=tokens), **close)
    inputs = {"pixel_values": torch.randn(5, 3, 32, 32), **tokens}
    logits, transposed = run_session(paths[0], ["logits_per_image", "logits_per_text"], **inputs)
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image
    for function in (torch.sigmoid, lambda values: values.softmax(1)):
        torch.testing.assert_close(function(logits), function(expected), rtol=0, atol=1e-4)
    assert torch.equal(logits.T, transposed)
    metadata = onnxruntime.InferenceSession(paths[1]).get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert float(metadata["logit_bias"]) == (0.0 if has_mask else -3.0)
    assert metadata["probabilities"] == ("softmax" if has_mask else "sigmoid")


def test_opset_and_data_of_large_models(tmp_path, monkeypatch):
    """Weights that are too large for one file lie beside it, and what reads the folder is told."""
    model = make_model("clip")
    monkeypatch.setattr(onnx_amorlip, "EXTERNAL_DATA_BYTES", 0)
    paths = export(model, tmp_path, opset=20)
    assert [path.name for path in paths[:2]] == ["model.onnx", "model.onnx_data"] and len(paths) == 6
    weights = onnx.load(paths[0], load_external_data=False).graph.initializer
    assert sum(weight.data_location == onnx.TensorProto.EXTERNAL for weight in weights) > 10
    assert [entry.version for entry in onnx.load(paths[2]).opset_import if entry.domain == ""] == [20]
    pixels = torch.randn(2, 3, 32, 32)
    (embeds,) = run_session(tmp_path / "onnx/vision_model.onnx", None, pixel_values=pixels)
    torch.testing.assert_close(embeds, expected_embeds(model, pixels), rtol=0, atol=1e-5)
    paths += onnx_amorlip.quantize_onnx(tmp_path / "onnx/vision_model.onnx")
    (quantized,) = run_session(paths[-2], None, pixel_values=pixels)
    torch.testing.assert_close(quantized, embeds, rtol=0, atol=0.05)
    write_config(model, tmp_path, paths)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {
        f"{name}.onnx": 1 for name in ("model", "vision_model", "text_model", "vision_model_quantized")
    }


def test_resnet_of_transformers_is_exported_in_the_size_that_is_given(tmp_path):
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = AmorLIPModel(AmorLIPConfig(**CLIP | {"vision_config": vision | {"layer_type": "basic"}})).eval()
    with pytest.raises(ValueError, match=r"vision_config \(resnet\) has no image_size"):
        export(model, tmp_path)
    paths = export(model, tmp_path, "pt2", image_size=(32, 48))
    pixels = torch.randn(3, 3, 32, 48)
    torch.testing.assert_close(torch.export.load(paths[1]).module()(pixels), expected_embeds(model, pixels))


def test_torch_export(tmp_path):
    model = make_model("clip")
    scorer, vision, text = (torch.export.load(path).module() for path in export(model, tmp_path, "pt2"))
    for batch in (1, 3, 64):
        pixels = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(vision(pixels), expected_embeds(model, pixels))
    for batch, length in TEXT_SIZES:
        tokens = make_tokens(batch, length)
        torch.testing.assert_close(text(*tokens.values()), expected_embeds(model, tokens=tokens))
    with torch.inference_mode():
        expected = model(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(scorer(pixels, *tokens.values())[0], expected)


def test_command(tmp_path, monkeypatch, capsys):
    folder = save_model(tmp_path / "model", logit_bias_init_value=-2.0)
    output = tmp_path / "out"
    assert run_main(monkeypatch, export_amorlip, "--model", folder, "--output", output, "--quantize") == 0
    assert "onnx/vision_model_quantized.onnx: " in capsys.readouterr().out
    # What transformers.js reads: the class and the activation, by the model type, and preprocessing in its own file.
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["logit_bias"]) == ("siglip", -2.0)
    assert json.loads((output / "preprocessor_config.json").read_text())["crop_size"]["height"] == 32
    model = AmorLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(output)(["a cat", "two red hearts"], padding=True, return_tensors="pt")
    expected = expected_embeds(model, tokens=tokens)
    (embeds,) = run_session(output / "onnx/text_model.onnx", None, **tokens)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    (embeds,) = run_session(output / "onnx/text_model_quantized.onnx", None, **tokens)
    assert 0 < (embeds - expected).abs().max() < 0.05
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere/nothing"], "nowhere/nothing"),
        (["--opset", "7"], "opset 7"),
        (["--format", "pt2", "--quantize"], "--quantize is for ONNX"),
    ],
)
def test_mistake_ends_in_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    folder = save_model(tmp_path / "model")
    command = ["--model", folder, "--output", tmp_path / "out", *arguments]
    assert run_main(monkeypatch, export_amorlip, *command) == 1
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
