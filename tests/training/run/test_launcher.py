"""Settings of the launcher are followed or refused by name, never ignored."""

import subprocess
import sys

import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT
from training.run.launcher import (
    LauncherSettings,
    check_gradient_accumulation,
    choose_precision,
    read_launcher_settings,
)


ACCELERATE = ["/usr/bin/python", "/opt/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    "environ, command, expected",
    [
        ({}, [], LauncherSettings()),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, [*ACCELERATE, "train.py"], LauncherSettings()),
        ({"ACCELERATE_MIXED_PRECISION": "BF16"}, [], LauncherSettings("bf16")),
        (
            {"ACCELERATE_MIXED_PRECISION": "no"},
            [*ACCELERATE, "--mixed_precision", "no", "train.py"],
            LauncherSettings("no"),
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            [*ACCELERATE, "--mixed-precision=fp16", "train.py"],
            LauncherSettings("fp16"),
        ),
        ({}, [*ACCELERATE, "train.py", "--mixed_precision", "bf16"], LauncherSettings()),
        ({}, ["bash", "-c", "x", "--mixed_precision", "bf16"], LauncherSettings()),
        ({}, [*ACCELERATE, "--gradient_accumulation_steps", "4", "train.py"], LauncherSettings(None, "4")),
        (
            {},
            ["python", "-m", "accelerate.commands.launch", "--gradient_accumulation_steps=2", "t.py"],
            LauncherSettings(None, "2"),
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, [], LauncherSettings(None, "8")),
    ],
)
def test_launchers_settings_are_read(environ, command, expected):
    assert read_launcher_settings(environ, command) == expected


@pytest.mark.parametrize(
    "requested, launcher, has_gpu, has_bf16, expected",
    [
        ("auto", None, False, False, "no"),
        ("auto", None, True, True, "bf16"),
        ("auto", None, True, False, "no"),
        ("auto", "bf16", False, False, "bf16"),
        ("auto", "fp16", True, True, "fp16"),
        ("auto", "no", True, True, "no"),
        ("bf16", "bf16", False, False, "bf16"),
        ("no", None, True, True, "no"),
        ("fp16", None, True, False, "fp16"),
    ],
)
def test_precision(requested, launcher, has_gpu, has_bf16, expected):
    assert choose_precision(requested, launcher, has_gpu=has_gpu, has_bf16=has_bf16)[0] == expected


@pytest.mark.parametrize(
    "requested, launcher, has_gpu, has_bf16, message",
    [
        ("no", "bf16", True, True, "mixed_precision is no in the configuration and bf16 in the launcher's settings"),
        ("fp16", "no", True, True, "mixed_precision is fp16 in the configuration and no in the launcher's settings"),
        ("auto", "fp8", True, True, "The launcher asks for mixed_precision fp8; choose no, bf16 or fp16"),
        ("auto", "fp16", False, False, "fp16 needs a GPU, and there is none .*follows the launcher"),
        ("fp16", None, False, False, "fp16 needs a GPU, and there is none"),
        ("bf16", None, True, False, "bf16 needs a GPU that has bfloat16"),
    ],
)
def test_contradictions_of_precision_name_both(requested, launcher, has_gpu, has_bf16, message):
    with pytest.raises(UserError, match=message):
        choose_precision(requested, launcher, has_gpu=has_gpu, has_bf16=has_bf16)


@pytest.mark.parametrize("steps", ["2", "auto", ""])
def test_gradient_accumulation_is_refused(steps):
    with pytest.raises(UserError, match=f"asks for {steps} gradient accumulation steps.*use --micro_batch_size"):
        check_gradient_accumulation(LauncherSettings(gradient_accumulation_steps=steps))


@pytest.mark.parametrize("steps", [None, "1"])
def test_one_accumulation_step_is_accepted(steps):
    check_gradient_accumulation(LauncherSettings(gradient_accumulation_steps=steps))


@pytest.mark.e2e
def test_flags_of_accelerate_launch_arrive(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from training.run.launcher import parent_command, read_launcher_settings\n"
        "print(read_launcher_settings(os.environ, parent_command()))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--mixed_precision", "no", "--gradient_accumulation_steps", "4", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(LauncherSettings("no", "4"))
