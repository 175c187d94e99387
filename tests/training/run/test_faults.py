"""What goes wrong in long runs: processes and disks. Nothing that was learned is lost."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import datasets
import psutil
import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import pretrain, start_forked, start_run
from tests.helpers.runs import assert_same_weights, build, one_thread, read_metrics, train
from tests.helpers.shards import PLAIN, write_shards
from training.run.checkpointing import find_damage, list_checkpoints


@pytest.fixture(scope="module")
def rows(demo_rows):
    raw = demo_rows.cast_column("image", datasets.Image(decode=False)).select(range(200))
    return [{"image": {"bytes": row["image"]["bytes"]}, "caption": row["caption"]} for row in raw]


@pytest.mark.e2e
def test_killed_worker_costs_no_step(recipe, rows, tmp_path):
    write_shards(rows, tmp_path / "shards")
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        num_train_epochs=8,
        dataloader_num_workers=2,
        augmentation={"rotation": 10},
    )
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train(path, "--output_dir", whole)
    (process,) = start_run(path, hurt)
    worker = psutil.Process(process.pid).children()[0]
    worker.kill()
    process.join(120)
    said = hurt.with_suffix(".log").read_text()
    assert process.exitcode == 1 and "could not be read" in said and "Traceback" not in said, said
    done = len(read_metrics(hurt))
    assert done > 2
    train(path, "--output_dir", hurt, "--resume_from_checkpoint", "latest")
    assert read_metrics(hurt) == read_metrics(whole)
    assert_same_weights(hurt, whole)


@pytest.mark.e2e
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk(recipe, rows, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], check=True)
    try:
        path = recipe(output_dir=str(disk / "run"), checkpoint_every=2, keep_last=100)
        with pytest.raises(UserError, match="cannot be written"):
            train(path)
        saved = list_checkpoints(disk / "run")
        assert saved and all(find_damage(folder) is None for folder in saved)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        train(path, "--resume_from_checkpoint", "latest")
        shutil.copytree(disk / "run", tmp_path / "mended")
    finally:
        subprocess.run(["umount", disk], check=True)
    train(recipe(output_dir=str(tmp_path / "whole")))
    assert read_metrics(tmp_path / "mended") == read_metrics(tmp_path / "whole")


def test_signal_while_saving(recipe, tmp_path, capsys):
    trainer = build(recipe(checkpoint_every=1))
    save_state = trainer.accelerator.save_state

    def interrupted_save(*args, **options):
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return save_state(*args, **options)

    trainer.accelerator.save_state = interrupted_save
    with one_thread():
        trainer.train()
    assert "Stopped by SIGTERM after step 5" in capsys.readouterr().out
    assert not list((tmp_path / "run/checkpoints").glob(".writing_*"))
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert find_damage(newest) is None and newest.name == "step_00000005"
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5


@pytest.mark.e2e
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(recipe, rows, tmp_path, kills):
    """Two processes on shards; SIGKILL to all of them at once, at any moment and also while they save."""
    moments = random.Random(kills)
    write_shards(rows, tmp_path / "shards")
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        shuffle="shards",
        shuffle_buffer=50,
        checkpoint_every=3,
        num_train_epochs=2 * kills,
        per_device_train_batch_size=8,
        dataloader_num_workers=1,
    )
    whole, killed, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output"
    result = pretrain(path, "--output_dir", whole, launch=2)
    assert result.returncode == 0, result.stderr
    total = len(read_metrics(whole))
    assert total == 24 * kills
    done = num_kills = 0
    for kill in range(kills):
        resume = ["--resume_from_checkpoint", "latest"] if (killed / "run_config.yaml").exists() else []
        command = ("training/pretrain.py", "--config", path, "--output_dir", killed, *resume)
        ranks = start_forked(*command, output=output, processes=2)
        goal = done + moments.randint(1, max(1, 2 * (total - done) // (kills - kill + 1)))
        deadline = time.time() + 120
        while done < goal and any(rank.is_alive() for rank in ranks) and time.time() < deadline:
            time.sleep(0.005)
            metrics = killed / "metrics.jsonl"
            done = metrics.read_text().count("\n") if metrics.exists() else 0
        time.sleep(moments.random() / 20)
        num_kills += all(rank.is_alive() for rank in ranks)
        members = [psutil.Process(rank.pid) for rank in ranks if rank.is_alive()]
        members += [child for member in members for child in member.children(recursive=True)]
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=30)
    assert num_kills >= kills - 1, f"runs ended before they were killed: {output.read_text()}"
    result = pretrain(path, "--output_dir", killed, "--resume_from_checkpoint", "latest", launch=2)
    assert result.returncode == 0, result.stderr
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_weights(killed, whole)
