"""What a resumed run may change, and how the rest is refused."""

import pytest

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig, parse_config
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
