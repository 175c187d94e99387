"""The trainer: what a run writes, exact resumption, failed steps, evaluation, memory."""

import functools
import json
import random
import shutil
import weakref

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import DEMO, TINY, pretrain
from tests.helpers.runs import (
    assert_same_weights,
    build,
    one_thread,
    read_metrics,
    train,
    train_until_killed,
)
from training.run.checkpointing import list_checkpoints


pytestmark = pytest.mark.e2e  # whole runs
RESNET = {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
RESUME = ("--resume_from_checkpoint", "latest")


# -- what a run writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["amorlip", "clip"])
def test_run_writes_model_logs_and_checkpoints(training_curves, recipe, tmp_path, objective, capsys):
    settings = {} if objective == "amorlip" else {"objective_args": {}}
    train(recipe(objective=objective, **settings), "--checkpoint_every", 5, "--keep_last", 2)
    printed = capsys.readouterr().out
    for heading in ("Device", "Precision", "Parameters", "Batch"):
        assert heading in printed
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
def test_saved_model_gives_the_trained_embeddings(recipe, demo_rows, tmp_path, changes):
    trainer = train(recipe(max_steps=4, **changes))
    inputs = trainer.processor(
        images=[demo_rows[i]["image"] for i in (0, 50)], text=["red heart", "a cat"], padding=True, return_tensors="pt"
    )
    trained, loaded = trainer.model.eval(), AutoModel.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        ours, theirs = trained(**inputs), loaded(**inputs)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(ours[name], theirs[name]), name
    # Loaded weights are memory-mapped; their alignment decides how a product with one column is summed.
    torch.testing.assert_close(ours.log_partition_per_image, theirs.log_partition_per_image, rtol=1e-6, atol=1e-6)


def test_existing_run_is_not_overwritten(recipe, tmp_path):
    path = recipe(max_steps=3)
    train(path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with pytest.raises(UserError, match="--resume_from_checkpoint latest"):
        train(path)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training_curves.png"])
def test_final_files_that_cannot_be_written(training_curves, recipe, tmp_path, name):
    """A folder in the way stands for a full disk: the system refuses to write the file."""
    path = recipe(max_steps=3)
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written to .*run.*step_00000003 is whole.*latest"):
        train(path)
    (tmp_path / "run" / name).rmdir()
    train(path, *RESUME)
    assert (tmp_path / "run" / name).is_file()


def test_two_processes_train_like_one(recipe, tmp_path):
    vision = {**TINY["vision_config"], "attention_dropout": 0.0}
    path = recipe(augmentation={}, vision_config=vision, max_steps=5)
    train(path, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 16)
    result = pretrain(path, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "8", launch=2)
    assert result.returncode == 0, result.stderr
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "contrastive_loss", "grad_norm", "logit_scale"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)


# -- resumption and failed steps ---------------------------------------------------------------------------------------


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
    path = recipe(objective=objective, checkpoint_every=4, keep_last=1, **changes)  # 18 steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(path, "--output_dir", whole)
    step = random.Random(objective + repr(changes)).randint(6, 16)
    train_until_killed(path, step, "--output_dir", killed)
    assert not (killed / "model.safetensors").exists()
    train(path, "--output_dir", killed, *RESUME)
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_weights(killed, whole)


def fail_once(module, name, at_call):
    """Make a method of a module raise in one of its calls, after it has done its work."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def failing(*args, **options):
        result = original(*args, **options)
        if next(calls) == at_call:
            raise RuntimeError("a failure in the middle of a step")
        return result

    setattr(module, name, failing)


RESNET_TOWER = {"vision_config": {**RESNET, "layer_type": "basic"}}
STAGES = {
    "data": ("bad_samples", "record"),
    "forward": ("encoder", "forward"),
    "objective": ("objective", "forward"),
    "backward": ("accelerator", "backward"),
    "optimizer": ("optimizer", "step"),
}


CHANGES = {"dropout": {}, "batch statistics": RESNET_TOWER, "fastclip": {"objective": "fastclip", "objective_args": {}}}


@pytest.fixture(scope="module")
def uninterrupted(recipe_factory, tmp_path_factory):
    """Return a function that returns a recipe and a run of it. A forward pass changes what each is named after."""

    @functools.cache
    def find(name):
        folder = tmp_path_factory.mktemp("uninterrupted")
        path = recipe_factory(folder, num_train_epochs=2, checkpoint_every=4, **CHANGES[name])
        train(path)
        return path, folder / "run"

    return find


@pytest.mark.parametrize(
    "name, stage, saved",
    [
        ("dropout", "data", 7),
        ("dropout", "forward", 7),
        ("dropout", "backward", 4),
        ("batch statistics", "forward", 7),
        ("batch statistics", "objective", 4),
        ("fastclip", "objective", 4),
        ("fastclip", "optimizer", 4),
    ],
)
def test_failed_step_leaves_no_half_step(uninterrupted, tmp_path, name, stage, saved, capsys):
    (path, whole), hurt = uninterrupted(name), tmp_path / "hurt"
    with one_thread():
        trainer = build(path, "--output_dir", hurt)
        owner, method = STAGES[stage]
        fail_once(getattr(trainer, owner), method, at_call=8)
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            trainer.train()
    assert ("Step 8 failed (RuntimeError); the steps before it are saved" in capsys.readouterr().out) == (saved == 7)
    assert list_checkpoints(hurt)[-1].name == f"step_{saved:08d}"
    train(path, "--output_dir", hurt, *RESUME)
    assert read_metrics(hurt) == read_metrics(whole)
    assert_same_weights(hurt, whole)


def test_data_that_fails_in_an_epochs_first_step(recipe, tmp_path):
    path = recipe(num_train_epochs=2, checkpoint_every=4)  # six steps per epoch
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train(path, "--output_dir", whole)
    with one_thread():
        trainer = build(path, "--output_dir", hurt)
        fail_once(trainer.bad_samples, "record", at_call=7)
        with pytest.raises(RuntimeError):
            trainer.train()
    assert list_checkpoints(hurt)[-1].name == "step_00000006"
    train(path, "--output_dir", hurt, *RESUME)
    assert read_metrics(hurt) == read_metrics(whole)


@pytest.mark.parametrize(
    "error, cause",
    [
        (EOFError(), "A data worker has ended"),  # it was lost while it passed a batch on
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nMore"),
            "pid 7. is killed by signal: Killed",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset"),
    ],
)
def test_lost_workers_end_a_run_with_a_sentence(recipe, error, cause):
    def batches():
        raise error
        yield

    trainer = build(recipe())
    with pytest.raises(UserError, match=f"Data for step 1 could not be read: .*{cause}[^.]*[.] Continue with [^\n]*$"):
        trainer._next_batch(batches())


def test_data_that_has_changed_is_refused(recipe, small_data, tmp_path):
    data = tmp_path / "pairs.parquet"
    shutil.copy(small_data, data)
    path = recipe(train_data=str(data), max_steps=4, checkpoint_every=2)
    train(path)
    datasets.load_dataset("parquet", data_files=str(data), split="train").select(range(90)).to_parquet(data)
    with pytest.raises(UserError, match="has 90 pairs, and had 100 when .*--override train_data"):
        build(path, *RESUME, "--max_steps", 6)
    train(path, *RESUME, "--max_steps", 6, "--override", "train_data")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 7))


def test_checkpoint_is_resumed_into_a_new_folder(recipe, tmp_path, demo_rows):
    """The captions have changed by then: the tokenizer comes with the checkpoint, also with one that was moved."""
    path = recipe(checkpoint_every=6)
    train(path)
    moved = shutil.copytree(tmp_path / "run/checkpoints/step_00000012", tmp_path / "moved/step_00000012")
    train(path, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", moved)
    assert_same_weights(tmp_path / "new", tmp_path / "run")
    shutil.rmtree(moved / "processor")  # as in checkpoints of earlier versions
    state = json.loads((moved / "train_state.json").read_text())
    state["sha256"] = {name: value for name, value in state["sha256"].items() if not name.startswith("processor/")}
    (moved / "train_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="The tokenizer of .*step_00000012 is neither in it nor in"):
        build(path, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", moved)


# -- steps that are not finite -----------------------------------------------------------------------------------------


def poison(trainer, steps):
    """Make text embeddings NaN in some steps."""

    def hook(module, inputs, output):
        if trainer.state.step + 1 in steps:
            return output._replace(text_embeds=output.text_embeds * float("nan"))
        return output

    trainer.encoder.register_forward_hook(hook)


def test_step_that_is_not_finite_changes_nothing(recipe, tmp_path):
    trainer = build(recipe(max_steps=8, objective="fastclip", objective_args={}))
    poison(trainer, range(5, 6))
    trainer.train()
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[4]["update/vision"] == lines[4]["update/text"] == 0 < lines[5]["update/vision"]
    assert lines[4]["parameter/vision"] == lines[3]["parameter/vision"] != lines[5]["parameter/vision"]
    assert lines[4]["loss"] is None or lines[4]["loss"] != lines[4]["loss"]
    assert all(abs(line["loss"]) < 100 for line in lines[5:])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/model.safetensors").values())
    assert not trainer.objective.log_u.isnan().any()


@pytest.mark.parametrize("keep_pixels", [False, True])
def test_too_many_of_them_stop_the_run_and_keep_the_batch(recipe, tmp_path, keep_pixels):
    trainer = build(recipe(max_skipped_steps=5, checkpoint_every=3), "--debug_pixels", str(keep_pixels).lower())
    poison(trainer, range(4, 100))
    with pytest.raises(UserError, match="not finite in the last 5 steps.*logit_scale .*sample_ids"):
        trainer.train()
    batch = load_file(tmp_path / "run/debug/not_finite_0.safetensors")
    assert batch["sample_ids"].shape == (16,) and "input_ids" in batch and ("pixel_values" in batch) == keep_pixels
    assert not list((tmp_path / "run").glob("*.safetensors")), "what lies at the root is published"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """A task on twelve emoji, whose data lies in the folder `data` beside it."""
    folder = tmp_path_factory.mktemp("task")
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train").select(range(12))
    names = [rows.features["label"].int2str(label) for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", list(range(12)), feature=datasets.ClassLabel(names=names))
    (folder / "data").mkdir()
    rows.to_parquet(folder / "data/rows.parquet")
    (folder / "task.yaml").write_text(yaml.safe_dump({"few": {"data": "rows.parquet", "split": "train"}}))
    return folder / "task.yaml"


def evaluated_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "eval.jsonl").read_text().splitlines()]


def test_missing_task_data_is_found_before_training(recipe, task_file, tmp_path):
    with pytest.raises(UserError, match="rows.parquet"):
        build(recipe(eval_tasks=[str(task_file)], eval_data_dir=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_evaluation_comes_after_the_checkpoint_and_is_made_up_for(recipe, task_file, tmp_path, monkeypatch):
    options = {"eval_tasks": [str(task_file)], "eval_data_dir": str(task_file.parent / "data")}
    path = recipe(max_steps=6, checkpoint_every=2, eval_every=2, **options)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(path, "--output_dir", whole)
    assert evaluated_steps(whole) == [2, 4, 6]
    with one_thread():
        trainer = build(path, "--output_dir", stopped)
        fail_once(trainer.evaluator, "_evaluate_model", at_call=2)
        with pytest.raises(RuntimeError):
            trainer.train()
    assert list_checkpoints(stopped)[-1].name == "step_00000004" and evaluated_steps(stopped) == [2]
    train(path, "--output_dir", stopped, *RESUME)
    assert (stopped / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    assert read_metrics(stopped) == read_metrics(whole)
    assert_same_weights(stopped / "best", whole / "best")


# -- what is trained, and what it costs --------------------------------------------------------------------------------


def test_frozen_encoders_dropped_patches_and_channels_last(recipe):
    options = {"freeze": ["vision"], "patch_dropout": 0.5, "channels_last": True, "text_groups": 2}
    trainer = build(recipe(max_steps=3, augmentation={}, **options))
    model, lengths = trainer.model, []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.vision_model.encoder.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    # A frozen encoder stays in evaluation mode, which drops no patches: 4 of 16 x 16 pixels and the class token.
    trainer.train()
    assert set(lengths) == {5}
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "vision_model" not in changed and {"text_model", "visual_projection", "text_projection"} <= changed
    del options["freeze"]
    trainer = build(recipe(max_steps=3, output_dir="unused", **options))
    encoder = trainer.model.vision_model.encoder
    encoder.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    lengths.clear()
    trainer.wrapped.train()
    batch = next(iter(trainer.dataloader))
    batch.pop("bad_samples")
    trainer.training_step(batch)
    assert lengths == [3]  # half of four patches


class PeakMemory(TorchDispatchMode):
    """Track the bytes of storages that are made inside, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage):
        if storage._cdata in self.storages:
            return
        key, size = storage._cdata, storage.nbytes()
        self.storages[key], self.live = size, self.live + size
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.live -= self.storages.pop(key, 0)


def test_logged_step_allocates_no_copy_of_the_model(recipe):
    towers = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 2}
    configs = {side: {**TINY[side], **towers} for side in ("vision_config", "text_config")}
    trainer = build(recipe(per_device_train_batch_size=2, objective="clip", objective_args={}, **configs))
    trainer.wrapped.train()
    batch = next(iter(trainer.dataloader))
    batch.pop("bad_samples")
    trainer.training_step(batch)  # makes the optimizer's state
    peaks = {}
    for logs in (False, True):
        with PeakMemory() as memory:
            trainer.training_step(dict(batch), logs)
        peaks[logs] = memory.peak
    model_bytes = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert peaks[False] > model_bytes, "the gradients alone are as large as the model"
    assert peaks[True] - peaks[False] < 0.2 * model_bytes
