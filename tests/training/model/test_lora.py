"""LoRA through the trainer: what is trained, what is written, and that the rest of a run works as ever."""

import json
import sys

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import DEMO, TINY, pretrain
from tests.helpers.runs import assert_same_weights, read_metrics, train, train_until_killed
from training.config import LoraConfig, parse_config
from training.model.construction import build_fresh_model
from training.model.encoder import PairEncoder
from training.model.lora import add_adapters, save_adapted
from training.model.tokenizer import train_tokenizer
from training.run.announcement import describe_run
from training.run.flops import FlopMeter


pytestmark = pytest.mark.e2e  # whole runs
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(recipe_factory, tmp_path_factory):
    """The folder of a model of CLIP's form with fresh weights, and its processor."""
    folder = tmp_path_factory.mktemp("base")
    towers = {side: {**TINY[side], **TOWER, "attention_dropout": 0.0} for side in ("vision_config", "text_config")}
    path = recipe_factory(folder, logit_bias_init_value=-1.0, **towers)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red heart", "cat face", "airplane"], 700)
    model, processor = build_fresh_model(parse_config(["--config", str(path)]), tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def lora_recipe(recipe_factory, base):
    """Writes a recipe that adapts `base` for six steps, with changes."""

    def write(folder, **changes):
        options = {
            "model": str(base),
            "lora": LORA,
            "vision_config": {},
            "text_config": {},
            "max_steps": 6,
            "checkpoint_every": 3,
            "augmentation": {},
            "learning_rate": 1e-2,
            "objective_args": {},
            **changes,
        }
        return recipe_factory(folder, **options)

    return write


@pytest.fixture(scope="module")
def finished(lora_recipe, tmp_path_factory):
    """The folder of a run that also looked for its best model."""
    folder = tmp_path_factory.mktemp("lora")
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train").select(range(12))
    names = [rows.features["label"].int2str(label) for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", list(range(12)), feature=datasets.ClassLabel(names=names))
    rows.to_parquet(folder / "rows.parquet")
    task = folder / "task.yaml"
    task.write_text(yaml.safe_dump({"few": {"data": str(folder / "rows.parquet"), "split": "train"}}))
    trainer = train(lora_recipe(folder, eval_tasks=[str(task)], eval_every=2))
    assert "M of adapters are trained" in describe_run(trainer)
    return folder / "run"


@pytest.fixture(scope="module")
def inputs(base, demo_rows):
    images, texts = [demo_rows[i]["image"] for i in (0, 50, 90)], ["red heart", "a cat", "airplane"]
    return AutoProcessor.from_pretrained(base)(images=images, text=texts, padding=True, return_tensors="pt")


def embed(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


OUTPUTS = ("image_embeds", "text_embeds", "logits_per_image", "log_partition_per_image", "log_partition_per_text")


def assert_same(a, b):
    for name in OUTPUTS:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


# -- what a run trains and writes --------------------------------------------------------------------------------------


def test_only_adapters_scale_and_bias_are_trained(finished, base):
    before, trained = load_file(base / "model.safetensors"), []
    for name, weight in load_file(finished / "checkpoints/step_00000006/model.safetensors").items():
        name = name.removeprefix("encoder.model.").replace(".base_layer", "")
        if ".lora_" in name:
            trained.append(name)
            assert weight.any(), name  # B is zero at first
        elif name.startswith("logit_"):
            assert not torch.equal(weight, before.pop(name)), name
        elif not name.startswith("amortizer."):
            assert torch.equal(weight, before.pop(name)), name
    assert all(name.startswith("amortizer.") for name in before)
    # Towers, layers, q and v, A and B.
    assert len(trained) == 2 * 2 * 2 * 2
    last = read_metrics(finished)[-1]
    assert all(last[f"{kind}/{tower}"] > 0 for kind in ("gradient", "update") for tower in ("vision", "text"))


def test_the_adapter_is_small_and_reloads_through_peft(finished, base, inputs):
    adapter, merged = finished / "adapter", AutoModel.from_pretrained(finished)
    assert type(merged) is AmorLIPModel
    file = adapter / "adapter_model.safetensors"
    assert file.stat().st_size < 0.05 * (finished / "model.safetensors").stat().st_size
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", file.name}
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain, adapted = AutoModel.from_pretrained(base), AutoModel.from_pretrained(base)
    adapted = PeftModel.from_pretrained(adapted, adapter)
    ours = embed(merged, inputs)
    assert_same(embed(adapted, inputs), ours)
    assert (embed(plain, inputs).image_embeds - ours.image_embeds).abs().max() > 1e-2
    assert (embed(plain, inputs).text_embeds - ours.text_embeds).abs().max() > 1e-2


def test_merged_weights_are_the_papers_formula(finished, base):
    before, after = load_file(base / "model.safetensors"), load_file(finished / "model.safetensors")
    adapter = load_file(finished / "adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name.startswith(("logit_", "amortizer.")):
            assert torch.equal(adapter[f"base_model.model.{name}"], after[name]), name
            continue
        layer = "base_model.model." + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapter:
            a, b = (adapter[f"{layer}.lora_{side}.weight"].double() for side in "AB")
            weight = (weight.double() + LORA["alpha"] / LORA["rank"] * b @ a).float()
            torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
        else:
            assert torch.equal(after[name], weight), name


def test_the_best_model_is_kept_as_both(finished, base, inputs):
    merged, model = AutoModel.from_pretrained(finished / "best"), AutoModel.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, finished / "best/adapter")
    assert_same(embed(adapted, inputs), embed(merged, inputs))
    steps = [json.loads(line)["step"] for line in (finished / "eval.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_saving_changes_nothing(base, tmp_path):
    model = AutoModel.from_pretrained(base)
    adapted = add_adapters(model, LoraConfig(dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before, random_state = {name: w.clone() for name, w in model.state_dict().items()}, torch.get_rng_state()
    save_adapted(adapted, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], w) for name, w in before.items())
    assert torch.equal(torch.get_rng_state(), random_state)


# -- the rest of a run -------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(lora_recipe, tmp_path):
    path = lora_recipe(tmp_path, lora={**LORA, "dropout": 0.2}, micro_batch_size=8)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(path, "--output_dir", whole)
    train_until_killed(path, 5, "--output_dir", stopped)
    train(path, "--output_dir", stopped, "--resume_from_checkpoint", "latest")
    assert read_metrics(stopped) == read_metrics(whole)
    assert_same_weights(stopped, whole)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (stopped, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 5}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_nothing(finished, lora_recipe, tmp_path, changes):
    train(lora_recipe(tmp_path, **changes))
    usual, ours = read_metrics(finished), read_metrics(tmp_path / "run")
    for name in ("loss", "grad_norm", "gradient/vision", "gradient/text"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in usual], rel=1e-3), name


def test_two_processes_train_as_one(finished, lora_recipe, tmp_path):
    result = pretrain(lora_recipe(tmp_path, per_device_train_batch_size=8), launch=2)
    assert result.returncode == 0, result.stderr
    usual, ours = read_metrics(finished), read_metrics(tmp_path / "run")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in usual], rel=1e-3)


def test_a_frozen_encoder_has_no_adapters(base):
    model = AutoModel.from_pretrained(base)
    add_adapters(model, LoraConfig(), freeze=["vision"])
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"text_model", "logit_scale", "logit_bias"}
    meter = FlopMeter(model, 32, 16)
    usual = FlopMeter(AutoModel.from_pretrained(base), 32, 16)
    assert meter.per_image == usual.per_image / 3
    # Forward, and backward to activations but not to weights; adapters come to little beside.
    assert 2 / 3 < meter.per_token / usual.per_token < 0.7


def test_convolutions_are_adapted_and_statistics_kept():
    torch.manual_seed(0)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    model = AmorLIPModel(AmorLIPConfig(vision_config=resnet, text_config=TINY["text_config"], projection_dim=32))
    add_adapters(model, LoraConfig(target_modules=["convolution", "v_proj"]))
    encoder = PairEncoder(model, [0.5] * 3, [0.5] * 3).train()
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    pixels, tokens = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(700, (4, 5))
    images, texts, scale, _ = encoder(pixels, tokens, torch.ones_like(tokens))
    (scale * images @ texts.T).logsumexp(1).sum().backward()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())
    reached = {name.split(".")[1] for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"vision_model", "text_model", "logit_scale"}


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1"),
        ({"target_modules": []}, "lora.target_modules is empty"),
        ({"target_modules": "q_proj"}, "lora.target_modules must be a list"),
        ({"rnk": 4}, "did you mean lora.rank?"),
    ],
)
def test_wrong_settings_are_named(lora_recipe, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        parse_config(["--config", str(lora_recipe(tmp_path, lora=values))])


def test_lora_needs_a_model_and_an_encoder(recipe, lora_recipe, tmp_path):
    with pytest.raises(UserError, match="name one with model"):
        parse_config(["--config", str(recipe(lora=LORA))])
    with pytest.raises(UserError, match="no encoder left to adapt"):
        parse_config(["--config", str(lora_recipe(tmp_path, freeze=["text", "vision"]))])


def test_layers_that_there_are_not(base):
    model = AutoModel.from_pretrained(base)
    with pytest.raises(UserError, match="vision encoder, a CLIPVisionModel.*fc1, fc2, k_proj.*freeze: .vision"):
        add_adapters(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="layer_norm1.*LayerNorm"):
        add_adapters(model, LoraConfig(target_modules=["layer_norm1"]))


def test_without_peft(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "amorlip\[lora\]"'):
        add_adapters(AutoModel.from_pretrained(base), LoraConfig())
