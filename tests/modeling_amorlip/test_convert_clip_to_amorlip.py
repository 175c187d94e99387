"""Models of Transformers and of the AmorLIP authors: the same embeddings as the implementation that they come from."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    pipeline,
)

from modeling_amorlip import convert_amorlip_to_open_clip, convert_clip_to_amorlip
from modeling_amorlip.convert_clip_to_amorlip import convert, save
from tests.helpers.checkout import run
from tests.helpers.dual_encoders import (
    assert_same_features,
    assert_same_logits,
    encoder_config,
    make_clip,
    padded_texts,
    randomize_biases,
)
from training.model.tokenizer import train_tokenizer


# Hidden size, layers, heads of the images and of the texts, and the size of the embedding.
SIZES = [((32, 1, 2), (48, 2, 3), 24), ((64, 3, 4), (32, 2, 2), 32), ((96, 2, 6), (64, 4, 4), 80)]


def run_main(monkeypatch, module, *arguments) -> int:
    """Run a command line in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


# -- Transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("sizes", SIZES)
def test_transformers_clip(tmp_path, sizes, activation):
    other = make_clip(sizes, activation)
    other.save_pretrained(tmp_path / "clip")
    converted = convert(tmp_path / "clip")
    save(converted, tmp_path / "ours")
    input_ids, mask = padded_texts(99)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": input_ids}
    for ours in (converted.model, AutoModel.from_pretrained(tmp_path / "ours")):
        assert_same_logits(other, ours, **inputs, attention_mask=mask)
        assert_same_logits(other, ours, **inputs)


@pytest.mark.parametrize("padding", [0, 99])
def test_the_end_of_text_in_old_configurations(tmp_path, padding):
    """CLIP's first configurations said 2 where texts are read at their highest token (Transformers issue 24650)."""
    other = make_clip(eos=2)
    other.save_pretrained(tmp_path)
    input_ids, mask = padded_texts(padding)
    ours = convert(tmp_path).model
    assert_same_logits(other, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask)
    modern = make_clip(eos=99).eval()
    modern.load_state_dict(other.state_dict())
    assert_same_logits(modern, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask)


def test_half_precision_sources_become_float32(tmp_path):
    other = make_clip().half()
    other.save_pretrained(tmp_path / "half")
    save(convert(tmp_path / "half"), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    input_ids, mask = padded_texts(99)
    assert_same_logits(
        other.float(), ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask
    )


@pytest.fixture
def siglip(tmp_path):
    """Save a small SigLIP with its processor; return a function from a tokenizer's inputs to (model, folder)."""

    def make(inputs=("input_ids",)):
        text = encoder_config(48, 2, 3, vocab_size=100, max_position_embeddings=64, projection_size=32)
        vision = encoder_config(32, 2, 2, image_size=32, patch_size=8)
        model = randomize_biases(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
        nn.init.constant_(model.logit_bias, -1.0)
        nn.init.constant_(model.logit_scale, 2.0)
        model.save_pretrained(tmp_path / "siglip")
        vocab = {"[UNK]": 0, "red": 2, "heart": 3, "[PAD]": 4, "a": 5, "cat": 6}
        backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_input_names=list(inputs)
        )
        images = SiglipImageProcessor(size={"height": 32, "width": 32})
        SiglipProcessor(images, tokenizer).save_pretrained(tmp_path / "siglip")
        return model, tmp_path / "siglip"

    return make


def test_transformers_siglip(siglip, tmp_path):
    other, folder = siglip()
    save(convert(folder), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert ours.logit_bias.item() == -1 and ours.config.text_config.pad_token_id == 4
    assert isinstance(ours.visual_projection, nn.Identity) and isinstance(ours.text_projection, nn.Identity)
    input_ids, mask = padded_texts(1)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": input_ids}
    assert_same_logits(other, ours, **inputs)
    assert_same_logits(other, ours, **inputs, attention_mask=mask)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, SiglipProcessor)
    texts = processor(text=["red heart", "heart"], padding="max_length", max_length=64, return_tensors="pt")
    assert_same_logits(other, ours, **inputs | texts)


@pytest.mark.parametrize("inputs", [("input_ids",), ("input_ids", "attention_mask")])
def test_zero_shot_pipeline_gives_the_probabilities_of_siglip(siglip, inputs, tmp_path):
    """Sigmoids over texts padded to the context, with and without a tokenizer's mask."""
    _, folder = siglip(inputs)
    save(convert(folder), tmp_path / "ours")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    labels = ["red heart", "a cat", "heart"]
    scores = []
    for path in (folder, tmp_path / "ours"):
        answers = pipeline("zero-shot-image-classification", model=str(path))(image, candidate_labels=labels)
        scores.append({answer["label"]: answer["score"] for answer in answers})
    assert scores[1] == pytest.approx(scores[0], rel=1e-5) and set(scores[0]) == set(labels)
    assert abs(sum(scores[1].values()) - 1) > 0.1  # no softmax
    alone = pipeline("zero-shot-image-classification", model=str(tmp_path / "ours"))(image, candidate_labels=labels[:1])
    assert alone[0]["score"] == pytest.approx(scores[0][labels[0]], rel=1e-5)


def test_transformers_siglip_of_any_resolution(tmp_path):
    text = encoder_config(32, 2, 2, vocab_size=100, max_position_embeddings=16, pad_token_id=1)
    vision = encoder_config(32, 2, 2, patch_size=4, num_patches=16)
    other = randomize_biases(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)))
    other.save_pretrained(tmp_path)
    shapes = torch.tensor([[4, 4], [2, 6]])
    patches_mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).int()
    assert_same_logits(
        other,
        convert(tmp_path).model,
        pixel_values=torch.randn(2, 16, 48),
        pixel_attention_mask=patches_mask,
        spatial_shapes=shapes,
        input_ids=padded_texts(1)[0],
    )


def test_siglip_without_pooling_is_refused(tmp_path):
    vision = encoder_config(32, 1, 2, image_size=32, patch_size=8, vision_use_head=False)
    SiglipModel(SiglipConfig(text_config=encoder_config(32, 1, 2), vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vision_use_head is False"):
        convert(tmp_path)


def test_command_line_takes_the_processor_along(tmp_path, demo_rows, monkeypatch, capsys):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    model = make_clip(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    arguments = ("--source", tmp_path / "clip", "--output", tmp_path / "ours")
    assert run_main(monkeypatch, convert_clip_to_amorlip, *arguments) == 0
    assert "without heads, with processor" in capsys.readouterr().out
    inputs = AutoProcessor.from_pretrained(tmp_path / "ours")(
        images=[row["image"].convert("RGB") for row in demo_rows.select([0, 9])],
        text=["a red heart", "a man"],
        padding=True,
        return_tensors="pt",
    )
    other = CLIPModel.from_pretrained(tmp_path / "clip")
    assert_same_logits(other, AutoModel.from_pretrained(tmp_path / "ours"), **inputs)
    names = load_file(tmp_path / "ours/model.safetensors")
    assert not [name for name in names if name.startswith("amortizer")]  # nobody takes fresh heads for trained ones
    arguments = ("--source", tmp_path / "ours", "--output", tmp_path / "back")
    assert run_main(monkeypatch, convert_amorlip_to_open_clip, *arguments) == 0
    back = convert(tmp_path / "back", tokenizer=tmp_path / "back")
    assert_same_logits(other, back.model, **inputs)


def test_command_line_refuses_with_one_line(tmp_path):
    result = run("-m", "modeling_amorlip.convert_clip_to_amorlip", "--source", tmp_path, "--output", tmp_path / "ours")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"error: {tmp_path} has no open_clip_model.safetensors" in result.stderr


# -- the AmorLIP authors' checkpoints ----------------------------------------------------------------------------------


def authors_head(weights: dict, embeds: torch.Tensor) -> torch.Tensor:
    """Compute the paper's head in float64, written from its formula."""
    w = {name: weight.double() for name, weight in weights.items()}
    norm, linear = nn.functional.layer_norm, nn.functional.linear
    hidden = linear(embeds, w["fc1.weight"], w["fc1.bias"]).clamp(min=0)
    hidden = norm(hidden, hidden.shape[-1:], w["norm1.weight"], w["norm1.bias"])
    hidden = linear(hidden, w["fc2.weight"], w["fc2.bias"]).clamp(min=0)
    hidden = norm(hidden, hidden.shape[-1:], w["norm2.weight"], w["norm2.bias"])
    return linear((hidden + embeds).clamp(min=0), w["fc3.weight"], w["fc3.bias"])[:, 0]


def authors_checkpoint(weights: dict) -> dict:
    torch.manual_seed(2)
    width, hidden = 24, 12
    shapes = {
        "fc1.weight": (hidden, width),
        "fc1.bias": (hidden,),
        "norm1.weight": (hidden,),
        "norm1.bias": (hidden,),
        "fc2.weight": (width, hidden),
        "fc2.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "fc3.weight": (1, width),
        "fc3.bias": (1,),
    }
    online, target = (
        {f"{side}_mlp.{name}": torch.randn(shape) for side in ("image", "text") for name, shape in shapes.items()}
        for _ in range(2)
    )
    return {
        "epoch": 33,
        "state_dict": {f"module.{name}": weight for name, weight in weights.items()},
        "lambda_mlps_state_dict": {f"module.{name}": weight for name, weight in online.items()},
        "lambda_ema_mlps_state_dict": target,
        "lambda_optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
    }


@pytest.mark.parametrize("known_from", ["argument", "params", "params, scaled"])
@torch.inference_mode()
def test_authors_checkpoints(stored_open_clip, known_from, tmp_path):
    folder, weights, _, tensors = stored_open_clip
    checkpoint = authors_checkpoint(weights)
    path = folder / "epoch_33.pt"
    torch.save(checkpoint, path)
    if known_from != "argument":
        extra = "denormalize_features: True\n" if "scaled" in known_from else ""
        (folder.parent / "params.txt").write_text(
            f"batch_size: 1024\nworld_size: 2\nmodel: RN50\nnormalize_type: L2\nrho_list: [8.5, -8.5]\n{extra}"
        )
    save(convert(path, batch_size=2048 if known_from == "argument" else None), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert_same_features(ours, tensors)
    outputs = ours(tensors["input_ids"], tensors["pixels"] / 127.5 - 1)
    factor = weights["logit_scale"].double().exp().sqrt() if "scaled" in known_from else 1.0
    for side, embeds, log_mean in (
        ("image", outputs.image_embeds, outputs.log_partition_per_image),
        ("text", outputs.text_embeds, outputs.log_partition_per_text),
    ):
        target = checkpoint["lambda_ema_mlps_state_dict"].items()
        head = {name.removeprefix(f"{side}_mlp."): w for name, w in target if name.startswith(side)}
        log_sum = authors_head(head, factor * embeds.double())
        torch.testing.assert_close(log_mean.double() + np.log(2047), log_sum, rtol=1e-5, atol=1e-5)


def test_authors_checkpoints_need_the_batch_size(stored_open_clip):
    folder, weights, _, _ = stored_open_clip
    torch.save(authors_checkpoint(weights), folder / "epoch_33.pt")
    with pytest.raises(ValueError, match="give batch_size"):
        convert(folder / "epoch_33.pt")
    with pytest.raises(ValueError, match="batch_size is 1"):
        convert(folder / "epoch_33.pt", batch_size=1)
    (folder.parent / "params.txt").write_text("batch_size: 8\nnormalize_type: CAPPED_L2\n")
    with pytest.raises(ValueError, match="normalize_type is CAPPED_L2"):
        convert(folder / "epoch_33.pt")


# -- what must not be run ----------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["root", "state_dict", "optimizer"])
def test_a_pickle_with_code_is_refused(stored_open_clip, tmp_path, where):
    folder, weights, _, _ = stored_open_clip
    code = Malicious(f"touch {tmp_path}/ran")
    content = {
        "root": code,
        "state_dict": {"state_dict": {**weights, "visual.proj": code}},
        "optimizer": {"state_dict": weights, "optimizer": code},
    }[where]
    torch.save(content, folder / "model.pt")
    with pytest.raises(ValueError, match="is refused: it holds code .*posix.system"):
        convert(folder / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    torch.save(Malicious(f"touch {tmp_path}/ran"), tmp_path / "model.pt")
    arguments = ("--source", tmp_path / "model.pt", "--output", tmp_path / "ours")
    assert run_main(monkeypatch, convert_clip_to_amorlip, *arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/model.pt is refused")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is refused: it holds code .*TorchScript"):
        convert(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"abc", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, suffix):
    path = (tmp_path / "model").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is refused: it is no readable file of tensors"):
        convert(path)


def test_code_of_a_source_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in its config.json is 'evil'"):
        convert(tmp_path)
    assert not (tmp_path / "ran").exists()
