"""eval/apps/calibrate.py: heads against exact partitions, and the command line as a user calls it."""

import io
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

from eval.apps.calibrate import encode_gallery, find_gallery, fit_amortizer, main
from eval.models import load_model
from eval.scoring import SCORINGS
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.configuration_amorlip import AmorLIPAmortizerConfig
from modeling_amorlip.convert_clip_to_amorlip import convert
from modeling_amorlip.embedder_amorlip import encode_texts
from tests.helpers.checkout import DEMO
from training.model.tokenizer import train_tokenizer


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def exact(ours, others, scale, bias):
    """log mean exp of every logit of `ours` with `others`, in float64."""
    return (scale * ours.double() @ others.double().T + bias).exp().mean(1).log()


@pytest.mark.parametrize(
    ("head_type", "size", "bias", "share"),
    [
        ("queue", 200, None, 1e-5),
        ("queue", 200, -10.0, 1e-5),
        ("prototype", 200, None, 1e-3),
        ("prototype", 20, -10.0, 0.2),
        ("residual_mlp", 1, None, 0.7),
    ],
)
def test_fitted_heads_approximate_exact_partitions(head_type, size, bias, share):
    """Their RMS error is below that share of the standard deviation of the targets."""
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    images, texts = (
        torch.nn.functional.normalize(centers[torch.randint(8, (n,)) ** 2 % 8] + 0.1 * torch.randn(n, 16), dim=-1)
        for n in (200, 200)
    )
    towers = {"vision_config": {**TOWER, "image_size": 32, "patch_size": 16}, "text_config": {**TOWER, "vocab_size": 9}}
    model = AmorLIPModel(AmorLIPConfig(**towers, projection_dim=16, logit_bias_init_value=bias))
    model.logit_scale.data.fill_(math.log(12))
    config = AmorLIPAmortizerConfig(head_type=head_type, size=size)
    fit_amortizer(model, images, texts, config, steps=400, batch_size=64)
    with torch.no_grad():
        predictions = model.amortizer(images, texts, model.logit_scale.exp(), model.logit_bias)
    for prediction, ours, others in zip(predictions, (images, texts), (texts, images), strict=True):
        target = exact(ours, others, 12, bias or 0)
        assert (prediction - target).square().mean().sqrt() < share * target.std()


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


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the command line in this process; returns its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_calibrate_fits_new_heads_and_keeps_towers(call, tiny_model, task, tmp_path):
    output = tmp_path / "calibrated"
    options = ["--samples", "40", "--size", "16", "--steps", "20", "--output", output]
    status, printed, errors = call(tiny_model, task, *options)
    assert status == 0, errors
    scorings = [entry.split()[0] for entry in printed.splitlines()[0].partition(": ")[2].split(", ")]
    assert scorings == [*SCORINGS, "before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, output))
    towers = [name for name in before if not name.startswith("amortizer")]
    assert all(torch.equal(before[name], after[name]) for name in towers) and len(towers) > 10
    assert AutoModel.from_pretrained(output).amortizer.text_head.prototypes.shape == (16, 32)
    assert load_model(str(output))[1].tokenizer("a cat")["input_ids"]


def test_calibrate_converts_clip_and_reads_pairs(call, demo_rows, small_data, tmp_path):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text["eos_token_id"] = tokenizer.eos_token_id
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "clip")
    options = ["--samples", "80", "--head_type", "residual_mlp", "--steps", "5", "--output", tmp_path / "ours"]
    status, _, errors = call(tmp_path / "clip", small_data, *options)
    assert status == 0, errors
    assert any(name.startswith("amortizer") for name in load_file(tmp_path / "ours/model.safetensors"))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), AmorLIPModel)


def test_converted_siglip_encodes_texts_as_its_source(demo_rows, tmp_path):
    tokenizer = train_tokenizer(demo_rows["caption"], 600)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    processor, texts = SimpleNamespace(tokenizer=tokenizer), ["a red heart", "a man with a very long coat"]
    ours = encode_texts(convert(tmp_path).model, processor, texts)
    torch.testing.assert_close(ours, encode_texts(model, processor, texts), rtol=1e-5, atol=1e-6)


def make_task_data(*samples):
    """Task data of retrieval from (function that decodes an image, captions)."""
    rows = [SimpleNamespace(label=-1, captions=captions, decode=decode) for decode, captions in samples]
    return SimpleNamespace(task=SimpleNamespace(name="pairs"), classes=[], samples=lambda: iter(rows))


def test_encode_gallery_names_what_is_wrong_with_the_data(tiny_model, demo_rows):
    def decode():
        return [demo_rows[0]["image"].convert("RGB")]

    def fail():
        return [Image.open(io.BytesIO(b"no image"))]

    model, processor = load_model(str(tiny_model))
    gallery = encode_gallery(model, processor, make_task_data((decode, ["a", "b"]), (decode, ["c"])))
    assert len(gallery.images) == 2 and gallery.text_owners.tolist() == [0, 0, 1] and gallery.classifier is None
    for data, message in (
        (make_task_data((decode, ["a"]), (fail, ["b"])), "pairs: image 1 cannot be decoded: it is not an image"),
        (make_task_data((decode, [])), "pairs has no captions"),
        (make_task_data(), "pairs has no images"),
    ):
        with pytest.raises(UserError, match=message):
            encode_gallery(model, processor, data)
    with pytest.raises(UserError, match="neither classes nor captions"):
        find_gallery("misc/winogavil", Path())


def test_calibrate_checks_its_output_first(call, tiny_model, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.apps.calibrate.calibrate", None)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        status, _, errors = call(tiny_model, small_data, "--output", folder)
        assert status == 1 and f"--output {folder} cannot be created" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere/at/all", "emoji_openmoji"], "nowhere/at/all"),
        (["nowhere/at/all", "emoji_openmoji", "--samples", "0"], "--samples must be at least 1, got 0"),
    ],
)
def test_calibrate_reports_mistakes(call, tmp_path, options, message):
    status, _, errors = call(*options, "--output", tmp_path)
    assert status == 1 and message in errors.splitlines()[-1]
