"""What a resumed run may change, and how the rest is refused."""

import shutil
from pathlib import Path

import datasets
import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.runs import build, read_metrics, train, train_until_killed
from training.config import PretrainConfig, parse_config
from training.run.checkpointing import list_checkpoints
from training.run.resume_settings import CHANGEABLE, Change, check_resumed_config


def config(*flags: str) -> PretrainConfig:
    return parse_config(["--output_dir", "a", "--train_data", "data", "--vision_config", "{x: 1, y: 2}", *flags])


def test_same_settings_change_nothing():
    assert check_resumed_config(config(), config()) == []


def test_listed_settings_may_change():
    flags = ["--output_dir", "b", "--max_steps", "9", "--log_every", "1", "--dataloader_num_workers", "4"]
    flags += ["--resume_from_checkpoint", "latest", "--eval_tasks", "t", "--eval_every", "5", "--report_to", "wandb"]
    changes = check_resumed_config(config(), config(*flags))
    assert {change.name for change in changes} == {flag[2:] for flag in flags[::2]}
    assert Change("max_steps", -1, 9) in changes


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", "1"], "seed is 1, and was 0."),
        (["--learning_rate", "1"], "learning_rate is 1.0, and was 0.001."),
        (["--train_data", "other"], "train_data is 'other', and was 'data'."),
        (["--objective", "clip"], "objective is 'clip', and was 'amorlip'."),
        (["--freeze", "vision"], "freeze is ['vision'], and was []."),
        (["--vision_config.x", "3"], "vision_config.x is 3, and was 1."),
        (["--vision_config", "{x: 1}"], "vision_config.y is None, and was 2."),
        (["--amortizer_config.head_type", "prototype"], "amortizer_config.head_type is 'prototype', and was None."),
        (["--augmentation.rotation", "5"], "augmentation.rotation is 5.0, and was 0.0."),
        (["--validation_samples", "5"], "validation_samples is 5, and was 0."),
    ],
)
def test_other_settings_are_refused_with_both_values(flags, message):
    with pytest.raises(UserError) as error:
        check_resumed_config(config(), config(*flags))
    name = message.split(" ")[0]
    assert message in str(error.value) and str(error.value).endswith(f"--override {name}.")
    changes = check_resumed_config(config(), config(*flags, "--override", name, "max_steps"))
    assert [change.name for change in changes if change.name != "override"] == [name]
    if "." in name:
        check_resumed_config(config(), config(*flags, "--override", name.split(".")[0]))


def test_every_refused_setting_is_named_at_once():
    with pytest.raises(UserError, match="seed is 1, and was 0; learning_rate .* --override seed learning_rate"):
        check_resumed_config(config(), config("--seed", "1", "--learning_rate", "1", "--max_steps", "3"))


def test_adapters_added_or_removed_are_refused():
    plain, adapted = (
        parse_config(["--output_dir", "a", "--train_data", "b", "--model", "m", *flags])
        for flags in ([], ["--lora.rank", "4"])
    )
    for saved, current in ((plain, adapted), (adapted, plain)):
        with pytest.raises(UserError, match="lora is .*, and was "):
            check_resumed_config(saved, current)


def test_mistyped_override_is_named():
    with pytest.raises(UserError, match="did you mean learning_rate"):
        check_resumed_config(config(), config("--override", "learning_rat"))


def test_changeable_settings_exist():
    assert {name for name in CHANGEABLE if not hasattr(config(), name)} == set()


# -- runs --------------------------------------------------------------------------------------------------------------

RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def run(recipe_factory, tmp_path_factory):
    """Return the recipe of a run with checkpoints of steps 2 and 4, and its folder."""
    folder = tmp_path_factory.mktemp("resumed")
    path = recipe_factory(folder, max_steps=4, checkpoint_every=2, warmup_steps=0, num_train_epochs=1)
    train(path)
    return path, folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    """Return the recipe, and a copy of the run's folder."""
    return run[0], Path(shutil.copytree(run[1], tmp_path / "copy"))


def test_settings_that_are_overridden_have_an_effect(copy):
    path, folder = copy
    changes = {"learning_rate": 5e-2, "logit_scale_learning_rate": 3e-2, "weight_decay": 0.7, "adam_beta1": 0.5}
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    options = (*RESUME, "--output_dir", folder, "--lr_scheduler_type", "constant", "--max_steps", 5, *flags)
    trainer = train(path, *options, "--override", "lr_scheduler_type", *changes)
    matrices, _, logit_scale, *_ = trainer.optimizer.param_groups
    assert matrices["lr"] == 5e-2 and logit_scale["lr"] == 3e-2
    assert matrices["weight_decay"] == 0.7 and matrices["betas"] == (0.5, 0.98) and logit_scale["weight_decay"] == 0
    assert read_metrics(folder)[-1]["lr"] == 5e-2


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--optimizer", "sgd"), "its optimizer has no dampening, momentum"),
        (("--objective", "clip", "--objective_args", "{}"), "CLIPObjective"),
        (("--freeze", "text"), "parameter group"),
        (("--layer_decay", "0.5"), "parameter group"),
        (("--vision_config.hidden_size", "48"), "size mismatch"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run, tmp_path, changes, message):
    path, folder = run
    names = [word[2:] for word in changes if word.startswith("--")]
    options = ("--resume_from_checkpoint", folder / "checkpoints/step_00000002", "--output_dir", tmp_path / "new")
    with pytest.raises(UserError, match=f"step_00000002 does not fit the settings of this run .*{message}"):
        build(path, *options, *changes, "--override", *names)


def test_fewer_steps_than_were_taken_are_refused(run):
    path, folder = run
    with pytest.raises(UserError, match="step_00000004 has taken 4 steps, more than the 3 of the run: raise max_steps"):
        build(path, *RESUME, "--max_steps", 3)


def test_checkpoints_after_the_one_that_is_resumed_are_set_aside(copy, capsys):
    path, folder = copy
    named = ("--resume_from_checkpoint", folder / "checkpoints/step_00000002", "--output_dir", folder)
    train_until_killed(path, 4, *named, "--checkpoint_every", 1, "--keep_last", 1)
    assert f"The checkpoints after step 2 are set aside as {folder}/checkpoints/set_aside_*" in capsys.readouterr().out
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["step_00000003"]
    assert (folder / "checkpoints/set_aside_00000004/model.safetensors").is_file()
    train(path, *RESUME, "--output_dir", folder)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4]


def test_data_of_the_same_number_of_pairs_is_refused_if_it_changed(copy, small_data, tmp_path):
    path, folder = copy
    rows = datasets.load_dataset("parquet", data_files=str(small_data), split="train")
    rows.select(range(99, -1, -1)).to_parquet(tmp_path / "other.parquet")
    settings = (folder / "run_config.yaml").read_text().replace(str(small_data), str(tmp_path / "other.parquet"))
    (folder / "run_config.yaml").write_text(settings)
    options = (*RESUME, "--output_dir", folder, "--train_data", tmp_path / "other.parquet", "--max_steps", 5)
    with pytest.raises(UserError, match="train_data has other pairs than when .*step_00000004 .*--override train_data"):
        build(path, *options)
    assert train(path, *options, "--override", "train_data").state.step == 5


def test_lines_of_a_log_that_are_damaged_are_dropped(copy):
    path, folder = copy
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100) + b"\nno json\n5\n")
    train(path, *RESUME, "--output_dir", folder, "--max_steps", 5)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_does_not_overwrite_another_run(copy, run, tmp_path):
    path, folder = run
    named = ("--resume_from_checkpoint", folder / "checkpoints/step_00000002")
    with pytest.raises(UserError, match="copy already holds another run, which would be overwritten"):
        build(path, *named, "--output_dir", copy[1])
    new = ("--output_dir", tmp_path / "new")
    train_until_killed(path, 4, *named, *new, "--checkpoint_every", 100)
    for again in (RESUME, named):
        trainer = build(path, *again, *new)
        assert trainer.state.step == 2 and trainer.checkpoint == folder / "checkpoints/step_00000002"
