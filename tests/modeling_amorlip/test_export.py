"""Both encoders outside of PyTorch: ONNX in onnxruntime, and `torch.export`, against the model itself."""

import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer, BitImageProcessor, CLIPProcessor

from modeling_amorlip import AmorLIPConfig, AmorLIPModel, export_amorlip
from modeling_amorlip.export_amorlip import export
from tests.helpers.checkout import TINY
from training.model.tokenizer import train_tokenizer


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 700, "max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
CLIP = {"vision_config": TINY["vision_config"], "text_config": {**TINY["text_config"], **WORDS}}
TOWERS = {
    "clip": CLIP,
    "dinov2-bert": {
        "vision_config": {**SMALL, "model_type": "dinov2", "image_size": 32, "patch_size": 16},
        "text_config": {**SMALL, **WORDS, "model_type": "bert"},
    },
    "resnet-causal": {
        "vision_config": {
            "model_type": "amorlip_resnet",
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": 4,
            "image_size": 32,
            "output_dim": 24,
        },
        "text_config": {**SMALL, **WORDS, "model_type": "qwen2", "num_key_value_heads": 1},
    },
}
TEXT_SIZES = [(1, 5), (3, 5), (64, 5), (1, 77), (3, 77), (64, 77)]


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
    return ids, mask


def expected_embeds(model, pixels=None, tokens=None):
    with torch.inference_mode():
        features = model.get_image_features(pixels) if tokens is None else model.get_text_features(*tokens)
    return torch.nn.functional.normalize(features.pooler_output, dim=-1)


@pytest.mark.parametrize("name", TOWERS)
def test_onnx_in_onnxruntime(name, tmp_path):
    model = make_model(name)
    vision, text = (onnxruntime.InferenceSession(path) for path in export(model, tmp_path))
    for batch in (1, 3, 64):
        pixels = torch.randn(batch, 3, 32, 32)
        (embeds,) = vision.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        torch.testing.assert_close(torch.tensor(embeds), expected_embeds(model, pixels), rtol=0, atol=1e-5)
    for batch, length in TEXT_SIZES:
        ids, mask = make_tokens(batch, length)
        (embeds,) = text.run(["text_embeds"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        torch.testing.assert_close(torch.tensor(embeds), expected_embeds(model, tokens=(ids, mask)), rtol=0, atol=1e-5)
    assert [axis for value in text.get_inputs() for axis in value.shape] == ["batch", "length"] * 2
    assert vision.get_inputs()[0].shape == ["batch", 3, 32, 32]


def test_resnet_of_transformers_is_exported_in_the_size_that_is_given(tmp_path):
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = AmorLIPModel(AmorLIPConfig(**CLIP | {"vision_config": vision | {"layer_type": "basic"}})).eval()
    with pytest.raises(ValueError, match=r"vision_config \(resnet\) has no image_size"):
        export(model, tmp_path)
    vision, _ = (torch.export.load(path).module() for path in export(model, tmp_path, "pt2", image_size=(32, 48)))
    pixels = torch.randn(3, 3, 32, 48)
    torch.testing.assert_close(vision(pixels), expected_embeds(model, pixels))


def test_torch_export(tmp_path):
    model = make_model("clip")
    vision, text = (torch.export.load(path).module() for path in export(model, tmp_path, "pt2"))
    for batch in (1, 3, 64):
        pixels = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(vision(pixels), expected_embeds(model, pixels))
    for batch, length in TEXT_SIZES:
        tokens = make_tokens(batch, length)
        torch.testing.assert_close(text(*tokens), expected_embeds(model, tokens=tokens))


def test_command(tmp_path, demo_rows, monkeypatch, capsys):
    model = make_model("clip")
    model.save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer(demo_rows["caption"][:200], 700)
    CLIPProcessor(BitImageProcessor(size={"shortest_edge": 32}), tokenizer).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    assert export_amorlip.main() == 0
    assert "vision_model.onnx: " in capsys.readouterr().out
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(["a cat", "two red hearts"], padding=True)
    (embeds,) = onnxruntime.InferenceSession(tmp_path / "out/text_model.onnx").run(None, dict(tokens))
    tokens = [torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")]
    torch.testing.assert_close(torch.tensor(embeds), expected_embeds(model, tokens=tokens), rtol=0, atol=1e-5)
