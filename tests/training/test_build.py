"""Everything that can be wrong with a run is found before it starts, and ends in one clear message."""

import sys
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator, DistributedType

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_texts
from tests.helpers.checkout import ROOT, TINY
from tests.helpers.runs import build, train
from training.build import build_encoder
from training.config import PretrainConfig
from training.run.processes import run_on_main, vary_random_state


RESNET = {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--train_data", "/nowhere/pairs.parquet"], "there is no such file or folder"),
        (["--caption_column", "captoin"], "its columns: ['caption', 'captions'"),
        (["--objective", "amorlipp"], "did you mean amorlip?"),
        (["--learning_rat", "1"], "did you mean learning_rate?"),
        (["--objective_args.onlin_steps", "1"], "did you mean objective_args.online_steps?"),
        (["--augmentation.rotatoin", "1"], "did you mean augmentation.rotation?"),
        (["--objective_args.positive_weight", "-1e-8"], "positive_weight must be at least 0, got -1e-08"),
        (["--vision_config.patch_size", "7"], "image_size 28 or 35"),
        (["--vision_config.model_type", "clop"], "vision_config.model_type is 'clop'"),
        (["--text_config.vocab_size", "100"], "needs more than 514"),
        (["--resume_from_checkpoint", "training"], "is not a checkpoint"),
        (["--resume_from_checkpoint", "latest"], "does not exist"),
        (["--per_device_train_batch_size", "101"], "do not fill one batch"),
        (["--warmup_steps", "500"], "warmup_steps (500)"),
        (["--lr_scheduler_type", "wsd", "--decay_steps", "17"], "decay_steps (17) and warmup_steps (2) are more than"),
        (["--eval_every", "5"], "eval_tasks is empty"),
        (["--eval_tasks", "[emoji_openmojo]"], "did you mean emoji_openmoji?"),
        (["--tokenizer", "/nowhere"], "tokenizer /nowhere cannot be loaded"),
        (["--output_dir", "LICENSE"], "is a file"),
        (["--push_to_hub", "false"], "The repository 'false' must be USER/NAME"),
        (["--micro_batch_size", "-1"], "micro_batch_size must be at least 0"),
        (["--objective_args.amortization", "mse"], "amortization is 'mse'; choose one of"),
        (["--objective", "neuclip", "--objective_args", "{}", "--amortizer_config.head_type", "queue"], "prototypes"),
        (["--micro_batch_size", "4", "--vision_config", str(RESNET)], "batch normalization"),
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
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "has no rows"),
        ("no caption", r"pairs could not be used \(ValueError"),
        ("empty folder", "is an empty folder"),
    ],
)
def test_bad_data_ends_in_one_clear_message(recipe, demo_rows, tmp_path, case, message):
    raw = demo_rows.cast_column("image", datasets.Image(decode=False))
    path = tmp_path / "bad.parquet"
    if case == "empty":
        pq.write_table(raw.data.table.slice(0, 0), path)
    elif case == "empty folder":
        path = tmp_path / "folder"
        path.mkdir()
    else:
        write_rows(raw, path, lambda i, row: {**row, "caption": " ", "captions": []})
    with pytest.raises(UserError, match=message):
        train(recipe(train_data=str(path)))


def test_texts_of_siglip_towers_are_padded_as_in_evaluation(recipe):
    """SigLIP reads a text at its last position, so the embedding depends on the padded length, mask or not."""
    text = {**TINY["text_config"], "model_type": "siglip_text_model", "projection_size": 32}
    trainer = build(recipe(text_config=text))
    batch = next(iter(trainer.dataloader))
    assert batch["input_ids"].shape[1] == 32 and batch["attention_mask"].sum(1).max() < 32
    model, processor = trainer.built.model.eval(), trainer.built.processor
    captions = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"][:4]]
    with torch.inference_mode():
        embeds = model.get_text_features(batch["input_ids"][:4], batch["attention_mask"][:4]).pooler_output
    evaluated = encode_texts(model, processor, captions[:1], normalize=False)
    torch.testing.assert_close(evaluated, embeds[:1], rtol=1e-4, atol=1e-5)


def test_recipe_needs_its_data():
    with pytest.raises(UserError, match="train_data is not set"):
        PretrainConfig(output_dir="x")


def test_other_layouts_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.XLA)
    with pytest.raises(UserError, match="set up for XLA, which is not supported"):
        build(recipe())


def test_gradient_accumulation_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="gradient.accumulation.*micro_batch_size"):
        build(recipe())


def test_batch_statistics_of_several_processes_need_gpus(recipe):
    trainer = build(recipe())
    processes = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    trainer.config.sync_batchnorm = True
    with pytest.raises(UserError, match="sync_batchnorm needs GPUs"):
        build_encoder(trainer.built, trainer.config, processes)


def test_processes_draw_their_own_random_numbers():
    drawn = []
    for rank in range(4):
        torch.manual_seed(7)  # what all processes have in common until the model is built
        expected = torch.rand(3) if rank == 0 else None
        torch.manual_seed(7)
        vary_random_state(7, rank)
        drawn.append(torch.rand(3))
        assert expected is None or torch.equal(drawn[0], expected), "one process draws what it always drew"
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4


def test_errors_of_the_main_process_are_the_users():
    accelerator = Accelerator(cpu=True)
    assert run_on_main(accelerator, lambda: 3) == 3

    def fail():
        raise UserError("not this one")

    with pytest.raises(UserError, match="not this one"):
        run_on_main(accelerator, fail)
