"""Runs that are stopped, checkpoints that are damaged, folders that cannot be written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT, environment_with_threads, pretrain, start
from tests.helpers.runs import assert_same_weights, read_metrics
from training.run.checkpointing import find_checkpoint, find_damage, list_checkpoints, lock_folder


@pytest.mark.parametrize("name, workers", [("SIGTERM", 2), ("SIGINT", 0), ("SIGUSR1", 0)])
def test_a_signal_stops_after_the_step_and_saves_it(recipe, tmp_path, name, workers):
    path = recipe(num_train_epochs=10, dataloader_num_workers=workers)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain(path, "--output_dir", whole).returncode == 0
    process = start(path, stopped)
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    command = said.strip().splitlines()[-1]
    assert f"Stopped by {name}" in said and command.endswith("--resume_from_checkpoint latest")
    assert not (stopped / "model.safetensors").exists()
    saved = list_checkpoints(stopped)[-1]
    assert read_metrics(stopped)[-1]["step"] == json.loads((saved / "train_state.json").read_text())["step"]
    result = subprocess.run(
        [sys.executable, *command.split()[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment_with_threads(1),
    )
    assert result.returncode == 0, result.stderr
    assert read_metrics(stopped) == read_metrics(whole)
    assert_same_weights(stopped, whole)


def test_a_signal_to_one_process_stops_all(recipe, tmp_path):
    process = start(recipe(num_train_epochs=4000, per_device_train_batch_size=8), tmp_path / "run", launch=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Stopped by" in said and list_checkpoints(tmp_path / "run")


@pytest.fixture(scope="module")
def run_folder(recipe_factory, tmp_path_factory):
    """A recipe, and a run of it with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    path = recipe_factory(folder, max_steps=4, checkpoint_every=2)
    assert pretrain(path).returncode == 0
    return path, folder / "run"


@pytest.mark.parametrize("damage", ["flipped byte", "file missing", "state cut off"])
def test_a_damaged_checkpoint_is_passed_over(run_folder, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(run_folder[1], folder)
    newest = folder / "checkpoints/step_00000004"
    file = newest / ("train_state.json" if damage == "state cut off" else "optimizer.bin")
    content = bytearray(file.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "file missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    assert find_checkpoint(folder, "latest").name == "step_00000002"
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        find_checkpoint(folder, str(newest))
    result = pretrain(run_folder[0], "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert result.returncode == 0 and "trying the one before it" in result.stderr
    assert find_damage(newest) is None
    assert_same_weights(folder, run_folder[1])


def test_a_full_disk_leaves_the_last_checkpoint(run_folder, tmp_path):
    path, folder = run_folder[0], tmp_path / "run"
    shutil.copytree(run_folder[1], folder)
    result = subprocess.run(
        [
            sys.executable,
            "training/pretrain.py",
            "--config",
            path,
            "--output_dir",
            folder,
            "--max_steps",
            "6",
            "--resume_from_checkpoint",
            "latest",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment_with_threads(1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert "step_00000004 is whole" in result.stderr and find_damage(list_checkpoints(folder)[-1]) is None
    assert {entry.name for entry in (folder / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}


def test_a_folder_serves_one_run_at_a_time(recipe, tmp_path):
    path = recipe(num_train_epochs=4000)  # longer than the second run takes to start
    process = start(path, tmp_path / "run")
    second = pretrain(path, "--resume_from_checkpoint", "latest")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert second.returncode == 1 and f"in use by another run (process {process.pid})" in second.stderr
    lock_folder(tmp_path / "run").close()


def test_checkpoints_kept_for_good(recipe, tmp_path):
    assert pretrain(recipe(max_steps=8, checkpoint_every=1, keep_every=3, keep_last=2)).returncode == 0
    assert [c.name[-1] for c in list_checkpoints(tmp_path / "run")] == ["3", "6", "7", "8"]


def test_another_number_of_processes_goes_on(recipe, tmp_path):
    changes = {"augmentation": {}, "checkpoint_every": 3}
    path = recipe(max_steps=6, **changes)
    assert pretrain(path, "--output_dir", tmp_path / "one").returncode == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/step_00000006")
    options = ["--output_dir", tmp_path / "two", "--resume_from_checkpoint", "latest"]
    wrong = pretrain(path, *options, "--per_device_train_batch_size", "4")
    assert wrong.returncode == 1 and "set per_device_train_batch_size to 16" in wrong.stderr
    result = pretrain(path, *options, "--per_device_train_batch_size", "8", launch=2)
    assert result.returncode == 0 and "not the same to the last bit" in result.stdout, result.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    assert two[3]["loss"] == pytest.approx(one[3]["loss"], rel=0.05)  # dropout differs
