"""Weights of others in and out: the same embeddings as the implementation that they come from."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
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
)

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.convert_amorlip_to_open_clip import export_open_clip
from modeling_amorlip.convert_clip_to_amorlip import convert, save
from modeling_amorlip.open_clip_amorlip import open_clip_architecture, to_open_clip_names
from tests.helpers.checkout import ROOT, run
from tests.helpers.hub_server import Hub, Repository
from training.model.tokenizer import train_tokenizer


DATA = os.path.join(os.path.dirname(__file__), "data")
CONVERT = "modeling_amorlip/convert_clip_to_amorlip.py"
EXPORT = "modeling_amorlip/convert_amorlip_to_open_clip.py"
# Hidden size, layers, heads of the images and of the texts, and the size of the embedding.
SIZES = [((32, 1, 2), (48, 2, 3), 24), ((64, 3, 4), (32, 2, 2), 32), ((96, 2, 6), (64, 4, 4), 80)]


def make_alive(model: nn.Module) -> nn.Module:
    """Moves the biases and gains that initialisation leaves at 0 or 1, where mistakes can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder(size, layers, heads, **fields) -> dict:
    return {
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **fields,
    }


def clip(sizes=SIZES[0], activation="quick_gelu", vocab_size=100, eos=99) -> CLIPModel:
    vision, text, width = sizes
    text = encoder(*text, vocab_size=vocab_size, max_position_embeddings=16, hidden_act=activation, pad_token_id=eos)
    text |= {"bos_token_id": 98, "eos_token_id": eos}
    vision = encoder(*vision, image_size=32, patch_size=8, hidden_act=activation)
    return make_alive(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)))


def padded_texts(padding: int):
    """Four texts of lengths 3 to 16 and their mask, ended by the highest token."""
    torch.manual_seed(1)
    input_ids, mask = torch.full((4, 16), padding), torch.zeros(4, 16, dtype=torch.long)
    for row, attended, length in zip(input_ids, mask, (3, 8, 15, 16), strict=True):
        row[:length] = torch.tensor([98, *torch.randint(3, 98, (length - 2,)), 99])
        attended[:length] = 1
    return input_ids, mask


@torch.inference_mode()
def assert_same(other, ours, **inputs):
    expected, outputs = other(**inputs), ours(**inputs)
    assert expected.logits_per_image.std() > 1e-3  # something is told apart
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


# -- Transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("sizes", SIZES)
def test_transformers_clip(tmp_path, sizes, activation):
    other = clip(sizes, activation)
    other.save_pretrained(tmp_path / "clip")
    converted = convert(tmp_path / "clip")
    save(converted, tmp_path / "ours")
    input_ids, mask = padded_texts(99)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": input_ids}
    for ours in (converted.model, AutoModel.from_pretrained(tmp_path / "ours")):
        assert_same(other, ours, **inputs, attention_mask=mask)
        assert_same(other, ours, **inputs)


@pytest.mark.parametrize("padding", [0, 99])
def test_the_end_of_text_in_old_configurations(tmp_path, padding):
    """CLIP's first configurations said 2 where texts are read at their highest token (Transformers issue 24650)."""
    other = clip(eos=2)
    other.save_pretrained(tmp_path)
    input_ids, mask = padded_texts(padding)
    ours = convert(tmp_path).model
    assert_same(other, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask)
    modern = clip(eos=99).eval()
    modern.load_state_dict(other.state_dict())
    assert_same(modern, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask)


def test_half_precision_sources_become_float32(tmp_path):
    other = clip().half()
    other.save_pretrained(tmp_path / "half")
    save(convert(tmp_path / "half"), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    input_ids, mask = padded_texts(99)
    assert_same(other.float(), ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=input_ids, attention_mask=mask)


def test_transformers_siglip(tmp_path):
    text = encoder(48, 2, 3, vocab_size=100, max_position_embeddings=16, projection_size=32)
    vision = encoder(32, 2, 2, image_size=32, patch_size=8)
    other = make_alive(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    nn.init.constant_(other.logit_bias, -3.0)
    nn.init.constant_(other.logit_scale, 2.0)
    other.save_pretrained(tmp_path / "siglip")
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2, "heart": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_input_names=["input_ids"]
    )
    size = {"height": 32, "width": 32}
    SiglipProcessor(SiglipImageProcessor(size=size), tokenizer).save_pretrained(tmp_path / "siglip")
    save(convert(tmp_path / "siglip"), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert ours.logit_bias.item() == -3
    assert isinstance(ours.visual_projection, nn.Identity) and isinstance(ours.text_projection, nn.Identity)
    input_ids, mask = padded_texts(1)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": input_ids}
    assert_same(other, ours, **inputs)
    assert_same(other, ours, **inputs, attention_mask=mask)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, SiglipProcessor)
    texts = processor(text=["red heart", "heart"], padding="max_length", max_length=16, return_tensors="pt")
    assert_same(other, ours, **inputs | texts)


def test_transformers_siglip_of_any_resolution(tmp_path):
    text = encoder(32, 2, 2, vocab_size=100, max_position_embeddings=16, pad_token_id=1)
    vision = encoder(32, 2, 2, patch_size=4, num_patches=16)
    other = make_alive(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)))
    other.save_pretrained(tmp_path)
    shapes = torch.tensor([[4, 4], [2, 6]])
    patches_mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).int()
    assert_same(
        other,
        convert(tmp_path).model,
        pixel_values=torch.randn(2, 16, 48),
        pixel_attention_mask=patches_mask,
        spatial_shapes=shapes,
        input_ids=padded_texts(1)[0],
    )


def test_siglip_without_pooling_is_refused(tmp_path):
    vision = encoder(32, 1, 2, image_size=32, patch_size=8, vision_use_head=False)
    SiglipModel(SiglipConfig(text_config=encoder(32, 1, 2), vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vision_use_head is False"):
        convert(tmp_path)


@pytest.mark.parametrize("script", [[CONVERT], ["-m", "modeling_amorlip.convert_clip_to_amorlip"]])
def test_command_line_takes_the_processor_along(tmp_path, demo_rows, script):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    model = clip(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    result = run(*script, "--source", tmp_path / "clip", "--output", tmp_path / "ours")
    assert result.returncode == 0, result.stderr
    assert "without heads, with processor" in result.stdout
    inputs = AutoProcessor.from_pretrained(tmp_path / "ours")(
        images=[row["image"].convert("RGB") for row in demo_rows.select([0, 9])],
        text=["a red heart", "a man"],
        padding=True,
        return_tensors="pt",
    )
    other = CLIPModel.from_pretrained(tmp_path / "clip")
    assert_same(other, AutoModel.from_pretrained(tmp_path / "ours"), **inputs)
    names = load_file(tmp_path / "ours/model.safetensors")
    assert not [name for name in names if name.startswith("amortizer")]  # nobody takes fresh heads for trained ones
    if script == [CONVERT]:
        result = run(EXPORT, "--source", tmp_path / "ours", "--output", tmp_path / "back")
        assert result.returncode == 0, result.stderr
        back = convert(tmp_path / "back", tokenizer=tmp_path / "back")
        assert_same(other, back.model, **inputs)


# -- OpenCLIP ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["vit", "resnet"])
def stored(request, tmp_path):
    """(folder as OpenCLIP writes it, state dict, config, inputs and features) of a small model, from data/."""
    path = os.path.join(DATA, f"open_clip_{request.param}.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["open_clip_config"])
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder, weights, config, tensors


@torch.inference_mode()
def assert_same_features(model: AmorLIPModel, tensors):
    images = model.get_image_features(tensors["pixels"] / 127.5 - 1).pooler_output
    texts = model.get_text_features(tensors["input_ids"]).pooler_output
    torch.testing.assert_close(images, tensors["image_features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, tensors["text_features"], rtol=1e-5, atol=1e-5)


def test_open_clip_folder(stored, tmp_path):
    folder, weights, config, tensors = stored
    (folder / "config.json").write_text('{"architecture": "vit_base"}')  # timm's, on the Hub beside OpenCLIP's
    save(convert(folder), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert_same_features(ours, tensors)
    visual = sum(w.numel() for name, w in weights.items() if name.startswith("visual.") and "running" not in name)
    batches = sum("num_batches" in name for name in weights)
    ours_visual = [*ours.vision_model.parameters(), *ours.visual_projection.parameters()]
    assert sum(p.numel() for p in ours_visual) == visual - batches
    assert ours.config.text_config.hidden_act == ("quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu")


def test_names_on_the_hub(stored, tmp_path):
    """Once OpenCLIP's files alone, once with Transformers' beside them, which then count."""
    folder, weights, _, tensors = stored
    other = clip() if "visual.proj" in weights else None
    if other:
        other.save_pretrained(folder)
    hub = Hub()
    repository = hub.repositories["user/clip"] = Repository(private=False)
    repository.branches["main"] = repository.add({f.name: f.read_bytes() for f in folder.iterdir()}, "weights")
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, CONVERT, "--source", "user/clip", "--output", str(tmp_path / "ours")]
    result = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    hub.close()
    assert result.returncode == 0, result.stderr
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    if other:
        assert_same(other, ours, pixel_values=torch.randn(2, 3, 32, 32), input_ids=padded_texts(99)[0])
    else:
        assert_same_features(ours, tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_open_clip_pickles(stored, prefix):
    folder, weights, _, tensors = stored
    path = folder / "epoch_1.pt"
    # A schedule by NumPy leaves its numbers in the optimiser.
    optimizer = {"param_groups": [{"lr": np.float64(1e-3)}]}
    weights = {prefix + name: weight for name, weight in weights.items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": weights, "optimizer": optimizer}, path)
    assert_same_features(convert(path).model, tensors)
    if not prefix:
        torch.save(weights, path)
        assert_same_features(convert(path).model, tensors)


def test_open_clip_quick_gelu_can_be_named(stored):
    folder, weights, _, _ = stored
    (folder / "open_clip_config.json").unlink()
    activation = [convert(folder, quick_gelu=q).model.config.text_config.hidden_act for q in (None, False, True)]
    assert activation == ["gelu", "gelu", "quick_gelu"]
    # OpenAI's own state dicts say so by what else they hold.
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(100)}
    torch.save(weights | extras, folder / "openai.pt")
    assert convert(folder / "openai.pt").model.config.text_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "RN50"])
def test_architecture_is_read_from_the_shapes(name):
    text = encoder(512, 12, 8, model_type="clip_text_model", intermediate_size=2048, hidden_act="gelu")
    fields = {
        "ViT-B-32": ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, text, 512),
        "ViT-L-14": (
            encoder(1024, 24, 16, model_type="clip_vision_model", intermediate_size=4096, patch_size=14)
            | {"hidden_act": "gelu"},
            text | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
            768,
        ),
        "ViT-H-14": (
            encoder(1280, 32, 16, model_type="clip_vision_model", intermediate_size=5120, patch_size=14)
            | {"hidden_act": "gelu"},
            text | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
            1024,
        ),
        "RN50": ({"model_type": "amorlip_resnet"}, text, 1024),
    }[name]
    config = AmorLIPConfig(**dict(zip(("vision_config", "text_config", "projection_dim"), fields, strict=True)))
    with torch.device("meta"):
        weights = to_open_clip_names(AmorLIPModel(config))
    found = AmorLIPConfig(**open_clip_architecture(weights, {}, "gelu"))
    for part in ("vision_config", "text_config"):
        assert getattr(found, part).to_diff_dict() == getattr(config, part).to_diff_dict()
    assert found.projection_dim == config.projection_dim


def test_out_to_open_clip_is_the_way_back(stored, tmp_path):
    folder, weights, config, _ = stored
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
    assert_same_features(convert(tmp_path / "back").model, stored[3])


def test_out_and_in_again_with_a_tokenizer_of_ones_own(tmp_path, demo_rows):
    """Its end of text is not its highest token, so OpenCLIP is told which one it is."""
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = encoder(32, 1, 2, model_type="clip_text_model", vocab_size=len(tokenizer), max_position_embeddings=16)
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = encoder(32, 1, 2, model_type="clip_vision_model", image_size=32, patch_size=8)
    model = make_alive(AmorLIPModel(AmorLIPConfig(text_config=text, vision_config=vision, logit_bias_init_value=-10.0)))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    export_open_clip(model, tmp_path, CLIPProcessor(image_processor, tokenizer))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"heads": 2}
    assert config["model_cfg"]["text_cfg"]["eos_id"] == tokenizer.eos_token_id == 1
    back = convert(tmp_path, tokenizer=tmp_path)
    inputs = back.processor(text=["a red heart", "a man"], padding=True, return_tensors="pt")
    assert_same(model, back.model, **inputs, pixel_values=torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="ends texts with 1.*reads at 7"):
        config["model_cfg"]["text_cfg"]["eos_id"] = 7
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        convert(tmp_path, tokenizer=tmp_path)


def test_encoders_that_open_clip_has_not_are_named(stored):
    model = AmorLIPModel(AmorLIPConfig(vision_config={"model_type": "convnextv2", "depths": [1, 1, 1, 1]}))
    with pytest.raises(ValueError, match="no place for the encoders.*convnextv2"):
        export_open_clip(model, stored[0])


def test_architectures_that_are_not_clip_are_refused(stored, tmp_path):
    folder, weights, config, _ = stored
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
    with pytest.raises(ValueError, match="no open_clip_model.safetensors, and its config.json says None"):
        convert(tmp_path)


# -- the AmorLIP authors' checkpoints ----------------------------------------------------------------------------------


def their_head(weights: dict, embeds: torch.Tensor) -> torch.Tensor:
    """METHOD's head in float64, written from its formula."""
    w = {name: weight.double() for name, weight in weights.items()}
    norm, linear = nn.functional.layer_norm, nn.functional.linear
    hidden = linear(embeds, w["fc1.weight"], w["fc1.bias"]).clamp(min=0)
    hidden = norm(hidden, hidden.shape[-1:], w["norm1.weight"], w["norm1.bias"])
    hidden = linear(hidden, w["fc2.weight"], w["fc2.bias"]).clamp(min=0)
    hidden = norm(hidden, hidden.shape[-1:], w["norm2.weight"], w["norm2.bias"])
    return linear((hidden + embeds).clamp(min=0), w["fc3.weight"], w["fc3.bias"])[:, 0]


def their_checkpoint(weights: dict) -> dict:
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
def test_authors_checkpoints(stored, known_from, tmp_path):
    folder, weights, _, tensors = stored
    checkpoint = their_checkpoint(weights)
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
        log_sum = their_head(head, factor * embeds.double())
        torch.testing.assert_close(log_mean.double() + np.log(2047), log_sum, rtol=1e-5, atol=1e-5)


def test_authors_checkpoints_need_the_batch_size(stored):
    folder, weights, _, _ = stored
    torch.save(their_checkpoint(weights), folder / "epoch_33.pt")
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
def test_a_pickle_with_code_is_refused(stored, tmp_path, where):
    folder, weights, _, _ = stored
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


def test_command_line_says_what_is_wrong(tmp_path):
    torch.save(Malicious(f"touch {tmp_path}/ran"), tmp_path / "model.pt")
    result = run(CONVERT, "--source", tmp_path / "model.pt", "--output", tmp_path / "ours")
    assert result.returncode == 1
    assert "\nerror: " in result.stderr and "is refused" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is refused: it holds code .*TorchScript"):
        convert(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, suffix):
    path = (tmp_path / "model").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is refused: it is no file of tensors"):
        convert(path)


def test_code_of_a_source_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its config.json says 'evil'"):
        convert(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- OpenCLIP itself ---------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "RN50"])
def test_open_clip_itself(name, tmp_path):
    """Both directions at full size, random weights; where OpenCLIP can be installed, which needs torchvision."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    other = make_alive(open_clip.create_model(name))
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
    text = encoder(32, 1, 2, model_type="clip_text_model", vocab_size=len(tokenizer), max_position_embeddings=16)
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"model_type": "amorlip_resnet", "width": 4, "depths": [1, 1, 1, 1], "num_attention_heads": 4}
    vision |= {"image_size": 48, "output_dim": 16}
    config = AmorLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_bias_init_value=-10.0)
    model = make_alive(AmorLIPModel(config))
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
