"""Heads fitted to a sample of a gallery: against exact partitions, and as a user fits them."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

from eval.apps.calibrate import fit_amortizer
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.configuration_amorlip import AmorLIPAmortizerConfig
from modeling_amorlip.convert_clip_to_amorlip import convert
from modeling_amorlip.embedder_amorlip import encode_texts
from tests.helpers.checkout import DEMO, pretrain, run
from training.model.tokenizer import train_tokenizer


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def exact(ours, others, scale, bias):
    """log mean exp of every logit of `ours` with `others`, in float64."""
    return (scale * ours.double() @ others.double().T + bias).exp().mean(1).log()


@pytest.mark.parametrize(
    ("head_type", "size", "share"),
    [
        ("queue", 200, 1e-5),
        ("prototype", 200, 1e-3),
        ("prototype", 20, 0.2),
        ("residual_mlp", 1, 0.7),
    ],
)
@pytest.mark.parametrize("bias", [None, -10.0])
def test_heads_come_near_the_exact_partitions(head_type, size, share, bias):
    """Their error is below that share of the spread of what they are to predict."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    images, texts = (
        torch.nn.functional.normalize(centres[torch.randint(8, (n,)) ** 2 % 8] + 0.1 * torch.randn(n, 16), dim=-1)
        for n in (200, 200)
    )
    towers = {"vision_config": {**TOWER, "image_size": 32, "patch_size": 16}, "text_config": {**TOWER, "vocab_size": 9}}
    model = AmorLIPModel(AmorLIPConfig(**towers, projection_dim=16, logit_bias_init_value=bias))
    model.logit_scale.data.fill_(math.log(12))
    config = AmorLIPAmortizerConfig(head_type=head_type, size=size)
    fit_amortizer(model, images, texts, config, steps=400, batch_size=64)
    with torch.no_grad():
        found = model.amortizer(images, texts, model.logit_scale.exp(), model.logit_bias)
    for prediction, ours, others in zip(found, (images, texts), (texts, images), strict=True):
        wanted = exact(ours, others, 12, bias or 0)
        assert (prediction - wanted).square().mean().sqrt() < share * wanted.std()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A YAML file of a task of 60 images."""
    import datasets
    import yaml

    folder = tmp_path_factory.mktemp("calibration")
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train")
    rows.select(range(60)).to_parquet(folder / "held_out.parquet")
    described = {"data": str(folder / "held_out.parquet"), "texts": str(DEMO / "openmoji.json")}
    (folder / "task.yaml").write_text(yaml.safe_dump({"tiny": described}))
    return folder / "task.yaml"


def test_command_line_gives_a_trained_model_new_heads(recipe, task, tmp_path):
    assert pretrain(recipe(max_steps=3)).returncode == 0
    output = tmp_path / "calibrated"
    options = ["--samples", "40", "--size", "16", "--steps", "20", "--output", output]
    result = run("eval/apps/calibrate.py", tmp_path / "run", task, *options)
    assert result.returncode == 0, result.stderr
    for said in ("cosine", "gallery", "amortized", "before"):
        assert said in result.stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", output))
    towers = [name for name in before if not name.startswith("amortizer")]
    assert all(torch.equal(before[name], after[name]) for name in towers) and len(towers) > 10
    assert AutoModel.from_pretrained(output).amortizer.text_head.prototypes.shape == (16, 32)
    scored = run("eval/run.py", "--model", output, "--tasks", task, "--scoring", "gallery", "amortized")
    assert scored.returncode == 0 and "amortized" in scored.stdout, scored.stderr


def test_command_line_converts_clip_and_takes_pairs(demo_rows, small_data, tmp_path):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text["eos_token_id"] = tokenizer.eos_token_id
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "clip")
    options = ["--samples", "80", "--head_type", "residual_mlp", "--steps", "5", "--output", tmp_path / "ours"]
    result = run("eval/apps/calibrate.py", tmp_path / "clip", small_data, *options)
    assert result.returncode == 0, result.stderr
    assert any(name.startswith("amortizer") for name in load_file(tmp_path / "ours/model.safetensors"))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), AmorLIPModel)


def test_texts_of_a_converted_siglip_are_encoded_as_its_own(demo_rows, tmp_path):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    processor, texts = SimpleNamespace(tokenizer=tokenizer), ["a red heart", "a man with a very long coat"]
    ours = encode_texts(convert(tmp_path).model, processor, texts)
    torch.testing.assert_close(ours, encode_texts(model, processor, texts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere/at/all", "emoji_openmoji"], "nowhere/at/all"),
        (["nowhere/at/all", "emoji_openmoji", "--samples", "0"], "--samples must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(tmp_path, options, said):
    result = run("eval/apps/calibrate.py", *options, "--output", tmp_path)
    assert result.returncode == 1 and said in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
