"""Checkpoints that are damaged, folders that cannot be written or locked, other numbers of processes."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import stat
import time
from types import SimpleNamespace

import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import TINY, pretrain, start_forked
from tests.helpers.runs import assert_same_weights, build, read_metrics, train, train_until_killed
from training.run import checkpointing
from training.run.checkpointing import find_checkpoint, find_damage, list_checkpoints, lock_folder
from training.run.train_state import TrainState


RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def run_folder(recipe_factory, tmp_path_factory):
    """A recipe, and a run of it with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    path = recipe_factory(folder, max_steps=4, checkpoint_every=2)
    train(path)
    return path, folder / "run"


@pytest.mark.parametrize("damage", ["flipped byte", "file missing", "state cut off"])
def test_damaged_checkpoint_is_passed_over(run_folder, tmp_path, capsys, damage):
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
    train(run_folder[0], "--output_dir", folder, *RESUME)
    assert "trying the one before it" in capsys.readouterr().err
    assert find_damage(newest) is None
    assert_same_weights(folder, run_folder[1])


@pytest.mark.e2e
def test_full_disk_leaves_the_last_checkpoint(run_folder, tmp_path):
    path, folder = run_folder[0], tmp_path / "run"
    shutil.copytree(run_folder[1], folder)
    command = ("training/pretrain.py", "--config", path, "--output_dir", folder, "--max_steps", 6, *RESUME)
    (process,) = start_forked(*command, output=tmp_path / "output")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process.join(120)
    said = (tmp_path / "output").read_text()
    assert process.exitcode == 1 and "cannot be written" in said and "Traceback" not in said
    assert "step_00000004 is whole" in said and find_damage(list_checkpoints(folder)[-1]) is None
    assert {entry.name for entry in (folder / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}


def test_folder_serves_one_run_at_a_time(recipe, tmp_path):
    path = recipe(max_steps=3)
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run"), pytest.raises(UserError, match=f"in use by another run .process {os.getpid()}"):
        train(path)
    train(path)


def test_data_workers_do_not_keep_a_folder_locked(tmp_path):
    """Those of a run that is killed end seconds after it."""
    file, context = lock_folder(tmp_path), multiprocessing.get_context("fork")
    ready, ours = context.Pipe()
    worker = context.Process(target=lambda: (ours.send("ready"), time.sleep(60)))
    worker.start()
    ready.recv()
    with pytest.raises(UserError, match="in use"):
        lock_folder(tmp_path)
    file.close()
    lock_folder(tmp_path).close()
    worker.kill()
    worker.join()


def test_checkpoints_kept_for_good(recipe, tmp_path):
    train(recipe(max_steps=8, checkpoint_every=1, keep_every=3, keep_last=2))
    assert [checkpoint.name[-1] for checkpoint in list_checkpoints(tmp_path / "run")] == ["3", "6", "7", "8"]


@pytest.mark.e2e
def test_another_number_of_processes_goes_on(recipe, tmp_path):
    vision = {**TINY["vision_config"], "attention_dropout": 0.0}  # processes draw other dropout masks
    path = recipe(max_steps=6, augmentation={}, checkpoint_every=3, vision_config=vision)
    one, two = tmp_path / "one", tmp_path / "two"
    train(path, "--output_dir", one)
    train_until_killed(path, 5, "--output_dir", two)
    with pytest.raises(UserError, match="set per_device_train_batch_size to 16"):
        build(path, "--output_dir", two, *RESUME, "--per_device_train_batch_size", 4)
    result = pretrain(path, "--output_dir", two, *RESUME, "--per_device_train_batch_size", "8", launch=2)
    assert result.returncode == 0 and "not the same to the last bit" in result.stdout, result.stderr
    ours, theirs = read_metrics(two), read_metrics(one)
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert ours[3]["loss"] == pytest.approx(theirs[3]["loss"], rel=1e-4)


def test_file_systems_without_locks_and_flushes(recipe, tmp_path, monkeypatch, capsys):
    """As Lustre without flock, and CIFS or FUSE without fsync of folders."""
    fsync = os.fsync

    def no_flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fsync_of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    checkpointing._warn_once.cache_clear()
    # In this module alone: other libraries lock files in their caches, and wait.
    without_locks = SimpleNamespace(flock=no_flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    monkeypatch.setattr(checkpointing, "fcntl", without_locks)
    monkeypatch.setattr(os, "fsync", fsync_of_files)
    train(recipe(max_steps=4, checkpoint_every=1))
    errors = capsys.readouterr().err
    assert errors.count("has no locks") == 1 and errors.count("cannot flush folders") == 1
    assert find_damage(list_checkpoints(tmp_path / "run")[-1]) is None


def test_failing_disks_are_not_passed_over(recipe, tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="checkpoint of step 2 cannot be written .* Input/output error"):
        train(recipe(max_steps=4, checkpoint_every=2))
    assert list_checkpoints(tmp_path / "run") == []


def test_state_of_other_versions_is_read():
    state = TrainState(step=7, samples_seen=70, global_batch_size=10, steps_per_epoch=3)
    assert (state.epoch, state.at_epoch_start) == (2, False)
    state.advance()
    state.advance()
    assert (state.step, state.samples_seen, state.epoch, state.at_epoch_start) == (9, 90, 3, True)
    values = json.loads(json.dumps({**state.to_dict(), "best_value": 0.5, "sha256": {}}))
    assert TrainState.from_dict(values) == state
