"""Training as a user starts it: what is written, exact resumption, several processes, and users' mistakes."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import modeling_amorlip  # noqa: F401
from tests.helpers.checkout import ROOT, environment_with_threads, pretrain
from tests.helpers.runs import assert_same_weights, read_metrics
from training.config import AugmentationConfig, parse_config
from training.data.order import PairSampler
from training.data.transforms import augment


@pytest.mark.parametrize("objective", ["amorlip", "clip"])
def test_a_run_leaves_what_is_promised(recipe, tmp_path, objective):
    arguments = {} if objective == "amorlip" else {"objective_args": {}}
    result = pretrain(recipe(objective=objective, **arguments), "--checkpoint_every", "5", "--keep_last=2")
    assert result.returncode == 0, result.stderr
    for said in ("Device", "Precision", "Parameters", "Batch"):
        assert said in result.stdout
    folder = tmp_path / "run"
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 19))  # 3 epochs of 100 // 16 steps
    assert lines[-1]["samples_seen"] == 18 * 16 and lines[-1]["epoch"] == 2
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000015", "step_00000018"]
    assert "versions" in (folder / "run_config.yaml").read_text()
    assert (folder / "training_curves.png").stat().st_size > 1000
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = processor(text=["a red Héart 🎉"], return_tensors="pt")
    assert text["input_ids"][0, -1] == model.config.text_config.eos_token_id


RESNET = {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_config": {**RESNET, "layer_type": "basic"}},
        *({"amortizer_config": {"head_type": h, "size": 50}} for h in ("prototype", "random_features", "queue")),
        {"objective": "siglip", "objective_args": {}},
        {"objective": "neuclip", "objective_args": {}},
    ],
)
def test_saved_model_gives_the_trainers_embeddings_bit_for_bit(recipe, demo_rows, tmp_path, changes):
    from training.trainer import Trainer

    trainer = Trainer(parse_config(["--config", str(recipe(max_steps=4, **changes))]))
    trainer.train()
    inputs = trainer.processor(
        images=[demo_rows[i]["image"] for i in (0, 50)], text=["red heart", "a cat"], padding=True, return_tensors="pt"
    )
    trained, loaded = trainer.model.eval(), AutoModel.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        ours, theirs = trained(**inputs), loaded(**inputs)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(ours[name], theirs[name]), name
    # Loaded weights are memory-mapped; where they lie decides how a product with one column is summed.
    torch.testing.assert_close(ours.log_partition_per_image, theirs.log_partition_per_image, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "objective, changes",
    [
        ("amorlip", {}),
        ("amorlip", {"amortizer_config": {"head_type": "prototype", "size": 50}}),
        ("clip", {"objective_args": {}}),
        ("fastclip", {"objective_args": {"version": "v2"}}),
        ("neuclip", {"objective_args": {}, "micro_batch_size": 5}),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(recipe, tmp_path, objective, changes):
    path = recipe(objective=objective, num_train_epochs=10, checkpoint_every=4, keep_last=1, **changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert pretrain(path, "--output_dir", whole).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "training/pretrain.py", "--config", path, "--output_dir", killed],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment_with_threads(1),
    )
    stop_after = random.randint(6, 45)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        metrics = killed / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= stop_after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists(), "the run was over before it was killed"
    result = pretrain(path, "--output_dir", killed, "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_weights(killed, whole)


def test_two_processes_train_like_one(recipe, tmp_path):
    changes = {"augmentation": {}, "vision_config": _without_dropout(), "max_steps": 5}
    one, two = tmp_path / "one", tmp_path / "two"
    path = recipe(**changes)
    result = pretrain(path, "--output_dir", one, "--per_device_train_batch_size", "16")
    assert result.returncode == 0, result.stderr
    result = pretrain(path, "--output_dir", two, "--per_device_train_batch_size", "8", launch=2)
    assert result.returncode == 0, result.stderr
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        for name in ("loss", "contrastive_loss", "grad_norm", "logit_scale"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)


def _without_dropout():
    from tests.helpers.checkout import TINY

    return {**TINY["vision_config"], "attention_dropout": 0.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--train_data", "/nowhere/pairs.parquet"], "there is no such file or folder"),
        (["--caption_column", "captoin"], "its columns: ['image', 'caption'"),
        (["--objective", "amorlipp"], "did you mean amorlip?"),
        (["--objective_args.onlin_steps", "1"], "did you mean objective_args.online_steps?"),
        (["--objective_args.beta", "half"], "objective_args.beta must be a number, got 'half'"),
        (["--objective_args.positive_weight", "-1e-8"], "positive_weight must be at least 0, got -1e-08"),
        (["--vision_config.patch_size", "7"], "image_size 28 or 35"),
        (["--vision_config.model_type", "clop"], "vision_config.model_type is 'clop'"),
        (["--text_config.vocab_size", "100"], "needs more than 514"),
        (["--resume_from_checkpoint", "training"], "is not a checkpoint"),
        (["--resume_from_checkpoint", "latest"], "does not exist"),
        (["--per_device_train_batch_size", "101"], "do not fill one batch"),
        (["--warmup_steps", "500"], "warmup_steps (500)"),
        (["--eval_tasks", "[emoji_openmojo]"], "did you mean emoji_openmoji?"),
        (["--tokenizer", "/nowhere"], "tokenizer /nowhere cannot be loaded"),
        (["--output_dir", "LICENSE"], "is a file"),
        (["--objective_args.amortization", "mse"], "amortization is 'mse'; choose one of"),
        (["--objective", "neuclip", "--objective_args", "{}", "--amortizer_config.head_type", "queue"], "prototypes"),
        (["--micro_batch_size", "4", "--vision_config", str(RESNET)], "batch normalisation"),
    ],
)
def test_mistakes_end_in_one_clear_message(recipe, tmp_path, changes, message, capsys, monkeypatch):
    from training import pretrain as script

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(recipe()), *changes])
    assert script.main() == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def write_rows(demo_rows, path, change):
    rows = [change(i, row) for i, row in enumerate(demo_rows.select(range(40)).to_list())]
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "has no rows"),
        ("no caption", "pairs could not be used (ValueError"),
        ("caption not text", "every caption must be text"),
        ("empty folder", "is an empty folder"),
    ],
)
def test_bad_data_ends_in_one_clear_message(recipe, demo_rows, tmp_path, case, message):
    import datasets

    raw = demo_rows.cast_column("image", datasets.Image(decode=False))
    path = tmp_path / "bad.parquet"
    if case == "empty":
        raw.select([]).to_parquet(path)
    elif case == "empty folder":
        path = tmp_path / "folder"
        path.mkdir()
    else:
        changes = {
            "no caption": lambda i, row: {**row, "caption": " ", "captions": []},
            "caption not text": lambda i, row: {**row, "caption": i},
        }
        write_rows(raw, path, changes[case])
    result = pretrain(recipe(train_data=str(path), dataloader_num_workers=1))
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_an_existing_run_is_not_overwritten(recipe, tmp_path):
    path = recipe(max_steps=3)
    assert pretrain(path).returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    result = pretrain(path)
    assert result.returncode == 1 and "--resume_from_checkpoint latest" in result.stderr
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}


def test_sampler_sees_every_pair_once_and_keeps_groups_apart():
    groups = [i // 3 for i in range(300)]

    def order(epoch):
        return np.random.default_rng(epoch).permutation(300)

    shares = [PairSampler(order, 300, 10, 2, rank, groups) for rank in range(2)]
    batches = list(shares[0].batches(0))
    assert sorted(sum(batches, [])) == list(range(300))
    repeated = sum(len(batch) - len({groups[i] for i in batch}) for batch in batches)
    assert repeated <= 6, "only the last batches may have to repeat a group"
    first = [next(iter(share)) for share in shares]
    assert [index for _, index in first[0] + first[1]] == batches[0]
    assert list(shares[0].batches(1)) != batches
    resumed = PairSampler(order, 300, 10, 2, 0, groups, start_step=17)
    iterator = iter(shares[0])
    assert [next(iterator) for _ in range(20)][17:] == [
        batch for batch, _ in zip(iter(resumed), range(3), strict=False)
    ]


def test_augmentation_is_a_function_of_its_seed(demo_rows):
    image = demo_rows[10]["image"].convert("RGB")
    settings = AugmentationConfig(
        crop_scale=[0.5, 1], horizontal_flip=0.5, rotation=20, zoom=[0.8, 1.2], color_jitter=0.4
    )
    first, again, other = (augment(image, 40, settings, random.Random(seed)) for seed in (1, 1, 2))
    assert first.size == (40, 40) and first.tobytes() == again.tobytes() != other.tobytes()
    unchanged = AugmentationConfig(crop_scale=[1, 1], crop_ratio=[1, 1])
    assert augment(image, 48, unchanged, random.Random(0)).tobytes() == image.tobytes()


def test_sharded_models_are_refused(recipe, monkeypatch):
    from accelerate import Accelerator, DistributedType

    from modeling_amorlip.cli_amorlip import UserError
    from training.trainer import Trainer

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="set up for FSDP; here every process has a whole model"):
        Trainer(parse_config(["--config", str(recipe())]))


def test_frozen_encoders_dropped_patches_and_channels_last(recipe):
    from training.trainer import Trainer

    options = {"freeze": ["vision"], "patch_dropout": 0.5, "channels_last": True, "text_groups": 2}
    trainer = Trainer(parse_config(["--config", str(recipe(max_steps=3, augmentation={}, **options))]))
    model, seen = trainer.model, []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.vision_model.encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[1]))
    trainer.encoder.train()
    # A frozen encoder stays in evaluation, which leaves no patches out: 4 of 16 pixels and the class token.
    trainer.train()
    assert set(seen) == {5}
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "vision_model" not in changed and {"text_model", "visual_projection", "text_projection"} <= changed
    del options["freeze"]
    trainer = Trainer(parse_config(["--config", str(recipe(max_steps=3, output_dir="unused", **options))]))
    trainer.model.vision_model.encoder.register_forward_hook(
        lambda module, args, output: seen.append(output[0].shape[1])
    )
    seen.clear()
    trainer.encoder.train()
    batch = next(iter(trainer.dataloader))
    batch.pop("bad_samples")
    trainer.training_step(batch)
    assert seen == [3]  # half of four patches


def test_batch_statistics_of_several_processes_need_gpus(recipe):
    result = pretrain(recipe(max_steps=3), "--sync_batchnorm", "true", launch=2)
    assert result.returncode and "sync_batchnorm needs GPUs" in result.stderr
