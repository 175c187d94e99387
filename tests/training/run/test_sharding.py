"""FSDP2: settings, what is sharded, and runs that train, stop and continue as with whole models."""

import random
import shutil
import time

import pytest
import torch

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import TINY, pretrain, run, start_run
from tests.helpers.runs import assert_same_weights, build, read_metrics
from tests.helpers.towers import TOWERS, make_config
from training.model.encoder import PairEncoder
from training.run.checkpointing import list_checkpoints
from training.run.sharding import ShardingSettings, find_layers, take_sharding_settings


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None),
        (FSDP, ShardingSettings()),
        (
            {**FSDP, "FSDP_OFFLOAD_PARAMS": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            ShardingSettings(),
        ),
        (
            {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B", "FSDP_RESHARD_AFTER_FORWARD": "False"},
            ShardingSettings(("A", "B"), reshard_after_forward=False),
        ),
        ({**FSDP, **PARALLEL, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, ShardingSettings(replicas=2)),
        ({**FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, ShardingSettings()),
    ],
)
def test_settings_are_taken_out_of_the_environment(environ, expected):
    environ = dict(environ)
    assert take_sharding_settings(environ) == expected
    assert "ACCELERATE_USE_FSDP" not in environ, "Accelerate would shard the model itself"


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported: use .*fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, which is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1; only FSDP 2 is supported: set fsdp_version to 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true: .*leave it out"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
        ({**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "the finished model is saved whole"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP or leave it out"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "choose true or false"),
        ({**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism, which is not supported"),
    ],
)
def test_settings_that_are_not_supported_are_named(environ, message):
    with pytest.raises(UserError, match=message):
        take_sharding_settings(dict(environ))


def test_one_process_has_nothing_to_shard(recipe, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert not build(recipe()).weights.sharded


@pytest.mark.parametrize("towers", TOWERS)
def test_layers_of_every_encoder(towers):
    encoder = PairEncoder(AmorLIPModel(make_config(towers)), [0.5] * 3, [0.5] * 3)
    layers = find_layers(encoder)
    counted = [parameter for layer in layers for parameter in layer.parameters()]
    assert len(layers) >= 4 and len(set(counted)) == len(counted), "no parameter is in two units"
    size = sum(
        p.numel() for tower in (encoder.model.vision_model, encoder.model.text_model) for p in tower.parameters()
    )
    assert sum(parameter.numel() for parameter in counted) > size / 3
    name = type(layers[0]).__name__
    assert find_layers(encoder, (name,)) == [layer for layer in layers if type(layer).__name__ == name]
    with pytest.raises(UserError, match=f"names Nothing, which this model does not have: name .*{name}"):
        find_layers(encoder, ("Nothing",))


def assert_few_errors(report):
    for name, values in report.items():
        assert values["error"] < 1e-5, (name, values)
        assert all(abs(share - 1) < 0.1 for share in values["shares"]), (name, values)


@pytest.mark.e2e
def test_sharded_runs(recipe, tmp_path):
    """Parameters after five steps, bytes per process, exact resumption, and other layouts, in one start."""
    path = recipe(max_steps=4, checkpoint_every=2, per_device_train_batch_size=8)
    options = ("--ema_decay", 0.5, "--micro_batch_size", 3, "--validation_samples", 10)
    result = run("tests/helpers/sharded_runs.py", path, tmp_path, *options, launch=2)
    assert result.returncode == 0, result.stderr
    assert "Sharding    FSDP2" in result.stdout
    assert_few_errors(torch.load(tmp_path / "compared.pt"))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("processes", [2, 4])
def test_every_objective_trains_as_with_whole_models(tmp_path, processes):
    result = run("tests/helpers/sharded_layouts.py", tmp_path / "report.pt", launch=processes, timeout=3600)
    assert result.returncode == 0, result.stderr
    assert_few_errors(torch.load(tmp_path / "report.pt"))


RESNET = (
    "{model_type: amorlip_resnet, image_size: 32, depths: [1, 1, 1, 1], width: 8, output_dim: 32, "
    "num_attention_heads: 4}"
)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [
        ("--gradient_checkpointing", "true", "--freeze", "[vision]"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "true", "--micro_batch_size", "4"),
        ("--vision_config", RESNET, "--objective", "clip", "--objective_args", "{}", "--ema_decay", "0.9"),
        ("--objective", "siglip", "--objective_args", "{}", "--text_groups", "2"),
        ("--objective", "fastclip", "--objective_args", "{}", "--patch_dropout", "0.5"),
        ("--model", "MODEL", "--vision_config", "{}", "--text_config", "{}", "--lora.rank", "2"),
    ],
    ids=lambda options: " ".join(options[:4:2]),
)
def test_sharded_runs_of_other_settings(request, recipe, tmp_path, options):
    if "MODEL" in options:
        options = tuple(str(request.getfixturevalue("tiny_model")) if word == "MODEL" else word for word in options)
    path = recipe(max_steps=4, checkpoint_every=2, per_device_train_batch_size=8)
    result = run("tests/helpers/sharded_runs.py", path, tmp_path, *options, launch=2)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.e2e
def test_killed_run_goes_on_with_any_number_of_processes(recipe, tmp_path, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    vision = {**TINY["vision_config"], "attention_dropout": 0.0}  # processes draw other dropout masks
    path = recipe(
        max_steps=60,
        checkpoint_every=1,
        keep_last=100,
        per_device_train_batch_size=8,
        augmentation={},
        vision_config=vision,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert pretrain(path, "--output_dir", whole, launch=2).returncode == 0
    ranks = start_run(path, killed, processes=2)
    moment = random.Random(1).randint(5, 40)
    while len(list_checkpoints(killed)) < moment:
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.01)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()
    for processes in (1, 2, 4):
        folder = tmp_path / f"on{processes}"
        shutil.copytree(killed, folder)
        newest = int(list_checkpoints(folder)[-1].name[5:])
        result = pretrain(
            path,
            *("--output_dir", folder, "--resume_from_checkpoint", "latest"),
            *("--per_device_train_batch_size", 16 // processes),
            launch=processes,
        )
        assert result.returncode == 0, result.stderr
        if processes == 2:
            assert read_metrics(folder) == read_metrics(whole)
            assert_same_weights(folder, whole)
        steps = slice(newest, newest + 5)  # rounding grows from step to step
        for ours, theirs in zip(read_metrics(folder)[steps], read_metrics(whole)[steps], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5), (processes, ours["step"])
