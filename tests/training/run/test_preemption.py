"""Signals that stop a run: none of them costs a step, and the printed command continues exactly."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT, environment_with_threads, start_run, wait_for_steps
from tests.helpers.runs import assert_same_weights, build, one_thread, read_metrics, train
from training.run.checkpointing import find_damage, list_checkpoints
from training.run.preemption import PreemptionHandler, resume_arguments


def signal_in_step(trainer, step, signals):
    """Send signals to this process in the middle of a step."""
    training_step = trainer.training_step

    def interrupted_step(batch, logs=False):
        metrics = training_step(batch, logs)
        if trainer.state.step + 1 == step:
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
        return metrics

    trainer.training_step = interrupted_step


@pytest.fixture(scope="module")
def whole(recipe_factory, tmp_path_factory):
    """Return the folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(recipe_factory(folder))
    return folder / "run"


@pytest.mark.e2e
@pytest.mark.parametrize(
    "signals, workers",
    [(["SIGTERM"], 1), (["SIGINT"], 0), (["SIGUSR1"], 0), (["SIGTERM", "SIGTERM"], 0), (["SIGINT", "SIGINT"], 0)],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_signals_stop_after_the_step_and_save_it(recipe, whole, tmp_path, monkeypatch, capsys, signals, workers):
    """A launcher forwards what the scheduler has sent to its processes already, so signals come twice."""
    path, stopped = recipe(dataloader_num_workers=workers), tmp_path / "stopped"
    handlers = [signal.getsignal(getattr(signal, name)) for name in signals]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(path), "--output_dir", str(stopped)])
    with one_thread():
        trainer = build(path, "--output_dir", stopped)
        signal_in_step(trainer, 5, signals)
        trainer.train()
    assert [signal.getsignal(getattr(signal, name)) for name in signals] == handlers
    printed = capsys.readouterr().out
    assert f"Stopped by {signals[0]} after step 5" in printed
    assert not (stopped / "model.safetensors").exists()
    assert list_checkpoints(stopped)[-1].name == "step_00000005" and read_metrics(stopped)[-1]["step"] == 5
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:3] == ["accelerate", "launch", "pretrain.py"]
    train(command[4], *command[5:])
    assert read_metrics(stopped) == read_metrics(whole)
    assert_same_weights(stopped, whole)


@pytest.mark.parametrize(
    "argv",
    [
        ["p.py", "--config", "c"],
        ["p.py", "--resume_from_checkpoint", "old/step_00000001", "--config", "c"],
        ["p.py", "--config", "c", "--resume_from_checkpoint=latest"],
    ],
)
def test_printed_command_continues_from_the_newest_checkpoint(argv):
    assert resume_arguments(argv) == ["p.py", "--config", "c", "--resume_from_checkpoint", "latest"]


def test_processes_that_lose_their_launcher_stop(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    handler = PreemptionHandler(Accelerator(cpu=True))
    assert not handler.should_stop(at_sync_point=True)
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert handler.should_stop(at_sync_point=True) and handler.cause == "the end of its launcher"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    alone = PreemptionHandler(Accelerator(cpu=True))
    monkeypatch.setattr(os, "getppid", lambda: parent + 2)
    assert not alone.should_stop(at_sync_point=True), "a shell may end before what it has started"


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_end(pids, seconds=60):
    deadline = time.time() + seconds
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.time() < deadline, "processes did not end"
        time.sleep(0.05)


def assert_stopped_with_a_checkpoint(folder, said):
    assert "Stopped by" in said, said
    newest = list_checkpoints(folder)[-1]
    assert find_damage(newest) is None and int(newest.name[5:]) == read_metrics(folder)[-1]["step"]


@pytest.mark.e2e
def test_a_signal_to_torchrun_and_its_processes(recipe, tmp_path):
    """As a scheduler sends it. test_launchers.py has all signals, launchers and targets."""
    path, folder = recipe(num_train_epochs=4000, per_device_train_batch_size=8), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + ["training/pretrain.py", "--config", path, "--output_dir", folder],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment_with_threads(1),
    )
    wait_for_steps(folder, lambda: process.poll() is None, lambda: process.communicate()[1])
    ranks = children_of(process)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    wait_for_end(ranks)
    assert_stopped_with_a_checkpoint(folder, said + errors)


@pytest.mark.e2e
def test_a_signal_to_one_process_stops_all(recipe, tmp_path):
    path, folder = recipe(num_train_epochs=4000, per_device_train_batch_size=8), tmp_path / "run"
    ranks = start_run(path, folder, processes=2)
    os.kill(ranks[-1].pid, signal.SIGUSR1)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert_stopped_with_a_checkpoint(folder, folder.with_suffix(".log").read_text())
