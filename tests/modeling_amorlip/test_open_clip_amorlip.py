"""OpenCLIP's models in and out: the same embeddings as OpenCLIP computed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPImageProcessor, CLIPProcessor

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.convert_amorlip_to_open_clip import export_open_clip
from modeling_amorlip.convert_clip_to_amorlip import convert, save
from modeling_amorlip.open_clip_amorlip import open_clip_architecture, to_open_clip_names
from tests.helpers.checkout import run
from tests.helpers.dual_encoders import (
    assert_same_features,
    assert_same_logits,
    encoder_config,
    make_clip,
    padded_texts,
    randomize_biases,
)
from tests.helpers.hub_server import Hub, Repository, connect
from training.model.tokenizer import train_tokenizer


def test_open_clip_folder(stored_open_clip, tmp_path):
    folder, weights, config, tensors = stored_open_clip
    (folder / "config.json").write_text('{"architecture": "vit_base"}')  # timm's, on the Hub beside OpenCLIP's
    save(convert(folder), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert_same_features(ours, tensors)
    visual = sum(w.numel() for name, w in weights.items() if name.startswith("visual.") and "running" not in name)
    batches = sum("num_batches" in name for name in weights)
    ours_visual = [*ours.vision_model.parameters(), *ours.visual_projection.parameters()]
    assert sum(p.numel() for p in ours_visual) == visual - batches
    assert ours.config.text_config.hidden_act == ("quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu")


def test_names_on_the_hub(stored_open_clip, monkeypatch, tmp_path):
    """Once OpenCLIP's files alone, once with Transformers' beside them, which then count."""
    folder, weights, _, tensors = stored_open_clip
    other = make_clip() if "visual.proj" in weights else None
    if other:
        other.save_pretrained(folder)
    hub = Hub()
    connect(monkeypatch, hub, tmp_path)
    repository = hub.repositories["user/clip"] = Repository(private=False)
    repository.branches["main"] = repository.add({f.name: f.read_bytes() for f in folder.iterdir()}, "weights")
    command = ("-m", "modeling_amorlip.convert_clip_to_amorlip", "--source", "user/clip")
    result = run(*command, "--output", tmp_path / "ours")
    hub.close()
    assert result.returncode == 0, result.stderr
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    if other:
        assert_same_logits(other, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=padded_texts(99)[0])
    else:
        assert_same_features(ours, tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_open_clip_pickles(stored_open_clip, prefix):
    folder, weights, _, tensors = stored_open_clip
    path = folder / "epoch_1.pt"
    # A schedule by NumPy leaves its numbers in the optimizer.
    optimizer = {"param_groups": [{"lr": np.float64(1e-3)}]}
    weights = {prefix + name: weight for name, weight in weights.items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": weights, "optimizer": optimizer}, path)
    assert_same_features(convert(path).model, tensors)
    if not prefix:
        torch.save(weights, path)
        assert_same_features(convert(path).model, tensors)


def test_open_clip_quick_gelu_can_be_named(stored_open_clip):
    folder, weights, _, _ = stored_open_clip
    (folder / "open_clip_config.json").unlink()
    activation = [convert(folder, quick_gelu=q).model.config.text_config.hidden_act for q in (None, False, True)]
    assert activation == ["gelu", "gelu", "quick_gelu"]
    # OpenAI's own state dicts say so by what else they hold.
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(100)}
    torch.save(weights | extras, folder / "openai.pt")
    assert convert(folder / "openai.pt").model.config.text_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "RN50"])
def test_architecture_is_read_from_the_shapes(name):
    text = encoder_config(512, 12, 8, model_type="clip_text_model", intermediate_size=2048, hidden_act="gelu")
    fields = {
        "ViT-B-32": ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, text, 512),
        "ViT-L-14": (
            encoder_config(1024, 24, 16, model_type="clip_vision_model", intermediate_size=4096, patch_size=14)
            | {"hidden_act": "gelu"},
            text | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
            768,
        ),
        "ViT-H-14": (
            encoder_config(1280, 32, 16, model_type="clip_vision_model", intermediate_size=5120, patch_size=14)
            | {"hidden_act": "gelu"},
            text | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
            1024,
        ),
        "RN50": ({"model_type": "amorlip_resnet"}, text, 1024),
    }[name]
    config = AmorLIPConfig(**dict(zip(("vision_config", "text_config", "projection_dim"), fields, strict=True)))
    with torch.device("meta"):
        weights = to_open_clip_names(AmorLIPModel(config))
    read = AmorLIPConfig(**open_clip_architecture(weights, {}, "gelu"))
    for part in ("vision_config", "text_config"):
        assert getattr(read, part).to_diff_dict() == getattr(config, part).to_diff_dict()
    assert read.projection_dim == config.projection_dim


def test_out_to_open_clip_is_the_way_back(stored_open_clip, tmp_path):
    folder, weights, config, _ = stored_open_clip
    export_open_clip(convert(folder).model, tmp_path / "back")
    exported = load_file(tmp_path / "back/open_clip_model.safetensors")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(exported[name].to(weight.dtype), weight), name
    written = json.loads((tmp_path / "back/open_clip_config.json").read_text())["model_cfg"]
    expected = {"quick_gelu": False, **config["model_cfg"]}
    for part in ("vision_cfg", "text_cfg"):
        assert {k: written[part][k] for k in expected[part]} == expected[part]
    assert (written["embed_dim"], written["quick_gelu"]) == (expected["embed_dim"], expected["quick_gelu"])
    assert "pool_type" not in written["text_cfg"]
    assert_same_features(convert(tmp_path / "back").model, stored_open_clip[3])


def test_out_and_in_again_with_a_tokenizer_of_its_own(tmp_path, demo_rows):
    """Its end of text is not its highest token, so OpenCLIP is told which one it is."""
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = encoder_config(32, 1, 2, model_type="clip_text_model", vocab_size=len(tokenizer), max_position_embeddings=16)
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = encoder_config(32, 1, 2, model_type="clip_vision_model", image_size=32, patch_size=8)
    model = randomize_biases(
        AmorLIPModel(AmorLIPConfig(text_config=text, vision_config=vision, logit_bias_init_value=-10.0))
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    export_open_clip(model, tmp_path, CLIPProcessor(image_processor, tokenizer))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"heads": 2}
    assert config["model_cfg"]["text_cfg"]["eos_id"] == tokenizer.eos_token_id == 1
    back = convert(tmp_path, tokenizer=tmp_path)
    inputs = back.processor(text=["a red heart", "a man"], padding=True, return_tensors="pt")
    assert_same_logits(model, back.model, **inputs, pixel_values=torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="ends texts with 1.*reads at 7"):
        config["model_cfg"]["text_cfg"]["eos_id"] = 7
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        convert(tmp_path, tokenizer=tmp_path)


def test_encoders_unknown_to_open_clip_are_named(stored_open_clip):
    model = AmorLIPModel(AmorLIPConfig(vision_config={"model_type": "convnextv2", "depths": [1, 1, 1, 1]}))
    with pytest.raises(ValueError, match="no place for the encoders.*convnextv2"):
        export_open_clip(model, stored_open_clip[0])


def test_architectures_that_are_not_clip_are_refused(stored_open_clip, tmp_path):
    folder, weights, config, _ = stored_open_clip
    save_file(weights | {"visual.extra": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="1 have no place, such as .*extra"):
        convert(folder)
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="text_cfg sets .'no_causal_mask'"):
        convert(folder)
    save_file({"visual.trunk.weight": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    with pytest.raises(ValueError, match="has no 'token_embedding.weight'.*SigLIP"):
        convert(tmp_path / "siglip.safetensors")
    with pytest.raises(
        ValueError, match="has no open_clip_model.safetensors, and the model_type in its config.json is None"
    ):
        convert(tmp_path)


# -- OpenCLIP itself ---------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "RN50"])
def test_open_clip_itself(name, tmp_path):
    """Both directions at full size, random weights; where OpenCLIP can be installed, which needs torchvision."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    other = randomize_biases(open_clip.create_model(name))
    torch.save(other.state_dict(), tmp_path / "model.pt")
    ours = convert(tmp_path / "model.pt", quick_gelu=name.endswith("quickgelu")).model
    visual = [*ours.vision_model.parameters(), *ours.visual_projection.parameters()]
    assert sum(p.numel() for p in visual) == sum(p.numel() for p in other.visual.parameters())
    if name == "RN50":
        assert sum(p.numel() for p in visual) == 38_316_896
    images = torch.randn(3, 3, 224, 224)
    input_ids = torch.zeros(3, 77, dtype=torch.long)
    for row, length in zip(input_ids, (3, 20, 77), strict=True):
        row[:length] = torch.tensor([49406, *torch.randint(1, 49000, (length - 2,)), 49407])
    export_open_clip(ours, tmp_path / "back")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    with torch.inference_mode():
        image_features, text_features = other.encode_image(images), other.encode_text(input_ids)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours.get_image_features(images).pooler_output, image_features, **close)
        torch.testing.assert_close(ours.get_text_features(input_ids).pooler_output, text_features, **close)
        torch.testing.assert_close(back.encode_image(images), image_features, **close)
        torch.testing.assert_close(back.encode_text(input_ids), text_features, **close)


@pytest.mark.interop
def test_open_clip_reads_our_tokenizer(tmp_path, demo_rows):
    """A model with a vocabulary of its own, whose end of text is not the highest token."""
    open_clip = pytest.importorskip("open_clip")
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = encoder_config(32, 1, 2, model_type="clip_text_model", vocab_size=len(tokenizer), max_position_embeddings=16)
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"model_type": "amorlip_resnet", "width": 4, "depths": [1, 1, 1, 1], "num_attention_heads": 4}
    vision |= {"image_size": 48, "output_dim": 16}
    config = AmorLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_bias_init_value=-10.0)
    model = randomize_biases(AmorLIPModel(config))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    export_open_clip(model, tmp_path, CLIPProcessor(image_processor, tokenizer))
    other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    words = ["a red heart", "a man and a woman"]
    with torch.inference_mode():
        theirs = other.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(words))
        ours = model.get_text_features(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        images = torch.stack([preprocess(row["image"].convert("RGB")) for row in demo_rows.select([0, 9])])
        theirs, ours = other.encode_image(images), model.get_image_features(images).pooler_output
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert other.logit_bias.item() == pytest.approx(model.logit_bias.item())
