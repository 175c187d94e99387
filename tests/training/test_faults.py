"""What goes wrong in long runs: files, disks, processes and numbers. Nothing that was learned is to be lost."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import open_image
from tests.helpers.checkout import ROOT, environment_with_threads, pretrain, start
from tests.helpers.runs import assert_same_weights, read_metrics
from tests.helpers.shards import PLAIN, write_shards, write_tar
from training.config import AugmentationConfig, parse_config
from training.data.transforms import augment
from training.run.checkpointing import find_damage, list_checkpoints
from training.trainer import Trainer


@pytest.fixture(scope="module")
def rows(demo_rows):
    raw = demo_rows.cast_column("image", datasets.Image(decode=False)).select(range(200))
    return [{"image": {"bytes": row["image"]["bytes"]}, "caption": row["caption"]} for row in raw]


def jpeg(row) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is that large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_unusable_pairs_are_replaced_listed_and_counted(recipe, rows, tmp_path):
    good = rows[0]["image"]["bytes"]
    bad = {
        "corrupt_jpeg": (("jpg", jpeg(rows[1])[:200]), ("txt", b"a cat")),
        "empty_image": (("png", b""), ("txt", b"a cat")),
        "bomb": (("png", png_header(50_000, 50_000)), ("txt", b"a cat")),
        "no_caption": (("png", good), ("txt", b"")),
        "long_caption": (("png", good), ("txt", b"cat " * 250_000)),
        "not_utf8": (("png", good), ("txt", b"caf\xe9")),
        "no_json": (("png", good), ("json", b"{cut")),
    }
    write_shards(rows[:93], tmp_path / "shards")
    write_tar(tmp_path / "shards/bad.tar", [(f"{k}.{e}", content) for k, m in bad.items() for e, content in m])
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        per_device_train_batch_size=20,
        num_train_epochs=2,
        dataloader_num_workers=1,
        max_bad_fraction=0.02,
    )
    result = pretrain(path)
    assert result.returncode == 0, result.stderr
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").open()]
    assert {entry["key"] for entry in listed} == set(bad) and len(listed) >= 14  # each of both epochs
    assert {entry["shard"] for entry in listed} == {str(tmp_path / "shards/bad.tar")}
    reasons = {entry["key"]: f"{entry['cause']}: {entry['reason']}" for entry in listed}
    for key, reason in {
        "bomb": "Image size (2500000000 pixels) exceeds limit",
        "no_caption": "the caption is ''",
        "long_caption": "the caption has 1000000 characters",
        "not_utf8": "UnicodeDecodeError",
        "no_json": "JSONDecodeError",
        "empty_image": "UnidentifiedImageError",
        "corrupt_jpeg": "OSError",
    }.items():
        assert reason in reasons[key]
    assert all(line["samples_seen"] == 20 * line["step"] for line in read_metrics(tmp_path / "run"))

    result = pretrain(path, "--output_dir", tmp_path / "strict", "--max_bad_fraction", "0.002")
    assert result.returncode == 1 and "3 pairs could not be used" in result.stderr
    assert "more than max_bad_fraction 0.002" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_tar_gives_its_whole_pairs(recipe, rows, tmp_path, cut):
    write_shards(rows[:100], tmp_path / "shards", shares=(0.5, 0.5))
    shard = tmp_path / "shards/00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(cut * len(content))])
    result = pretrain(recipe(**PLAIN, train_data=str(tmp_path / "shards"), max_steps=3))
    assert result.returncode == 0, result.stderr
    number = int(result.stdout.split("Data        ")[1].split()[0])
    assert 50 + 15 < number < 100
    assert f"Damaged     {shard}: " in result.stdout and "its whole pairs are used" in result.stdout
    for other in (tmp_path / "shards").iterdir():
        other.write_bytes(b"")
    result = pretrain(recipe(**PLAIN, train_data=str(tmp_path / "shards"), output_dir=str(tmp_path / "other")))
    assert result.returncode == 1 and "has no pairs" in result.stderr and "Traceback" not in result.stderr


def test_images_of_every_kind_are_decoded_right():
    gradient = Image.linear_gradient("L").resize((64, 64))
    colours = Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)])
    plain = parse_config(["--output_dir", "x", "--train_data", "x"])
    plain.augmentation = AugmentationConfig(crop_scale=[1, 1], crop_ratio=[1, 1])

    def decoded(image, form="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        opened = open_image(buffer.getvalue(), 10**6)
        result = augment(opened, 64, plain.augmentation, random.Random(0))
        assert (result.mode, result.size) == ("RGB", (64, 64))
        return torch.tensor(list(result.get_flattened_data()), dtype=torch.float)

    def distance(a, b):
        return (a - b).abs().mean().item()

    expected, grey = decoded(colours), decoded(gradient.convert("RGB"))
    assert distance(decoded(gradient), grey) == 0
    deep = Image.fromarray((torch.tensor(gradient.get_flattened_data()).reshape(64, 64) * 257).numpy().astype("uint16"))
    assert distance(decoded(deep), grey) < 1  # 16 bits
    assert distance(decoded(colours.quantize(256)), expected) < 6
    assert distance(decoded(colours.convert("CMYK"), "JPEG", quality=95), expected) < 4
    assert distance(decoded(colours, "JPEG", quality=95), expected) < 4
    assert distance(decoded(colours, "WEBP", lossless=True), expected) == 0
    transparent = colours.copy()
    transparent.putalpha(0)
    assert decoded(transparent).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = decoded(colours.rotate(90), "JPEG", quality=95, exif=exif)
    assert distance(turned, expected) < 4 < distance(turned, decoded(colours.rotate(90)))


def test_a_large_jpeg_is_reduced_while_it_is_decoded():
    image = Image.effect_mandelbrot((1024, 1024), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    plain = parse_config(["--output_dir", "x", "--train_data", "x"]).augmentation
    opened = open_image(buffer.getvalue(), 10**7)
    ours = augment(opened, 128, plain, random.Random(1))
    assert opened.size == (256, 256)  # a crop of at least 0.9 needs no more
    whole = augment(image, 128, plain, random.Random(1))
    ours, whole = (torch.tensor(list(image.get_flattened_data())).float() for image in (ours, whole))
    assert (ours - whole).abs().mean() < 5


def test_a_killed_worker_costs_no_step(recipe, rows, tmp_path):
    write_shards(rows, tmp_path / "shards")
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        num_train_epochs=30,
        dataloader_num_workers=2,
        augmentation={"rotation": 10},
    )
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert pretrain(path, "--output_dir", whole).returncode == 0
    process = start(path, hurt)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "could not be read" in errors and "Traceback" not in errors, errors
    done = len(read_metrics(hurt))
    assert done > 2
    result = pretrain(path, "--output_dir", hurt, "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    assert read_metrics(hurt) == read_metrics(whole)
    assert_same_weights(hurt, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(recipe, rows, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], check=True)
    try:
        path = recipe(output_dir=str(disk / "run"), checkpoint_every=2, keep_last=100)
        result = pretrain(path)
        assert result.returncode == 1 and "cannot be written" in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
        saved = list_checkpoints(disk / "run")
        assert saved and all(find_damage(folder) is None for folder in saved)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        result = pretrain(path, "--resume_from_checkpoint", "latest")
        assert result.returncode == 0, result.stderr
        shutil.copytree(disk / "run", tmp_path / "mended")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert pretrain(recipe(output_dir=str(tmp_path / "whole"))).returncode == 0
    assert read_metrics(tmp_path / "mended") == read_metrics(tmp_path / "whole")


def test_a_signal_while_saving(recipe, tmp_path):
    path = recipe(num_train_epochs=40, checkpoint_every=1)
    process = start(path, tmp_path / "run")
    deadline = time.time() + 60
    while not list((tmp_path / "run/checkpoints").glob(".writing_*")):
        assert time.time() < deadline
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped by SIGTERM" in said, errors
    assert not list((tmp_path / "run/checkpoints").glob(".writing_*"))
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert find_damage(newest) is None and int(newest.name[5:]) == read_metrics(tmp_path / "run")[-1]["step"]


class Poisoned(Trainer):
    """Text embeddings become NaN in some steps."""

    steps: range

    def _loss(self, image_embeds, text_embeds, *others):
        if self.state.step + 1 in self.steps:
            text_embeds = text_embeds * float("nan")
        return super()._loss(image_embeds, text_embeds, *others)


def test_a_step_that_is_not_finite_changes_nothing(recipe, tmp_path):
    Poisoned.steps = range(5, 6)
    trainer = Poisoned(parse_config(["--config", str(recipe(max_steps=8, objective="fastclip", objective_args={}))]))
    trainer.train()
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[4]["update/vision"] == lines[4]["update/text"] == 0 < lines[5]["update/vision"]
    assert lines[4]["loss"] is None and all(abs(line["loss"]) < 100 for line in lines[5:])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/model.safetensors").values())
    assert not (trainer.objective.log_u == float("nan")).any()


def test_too_many_of_them_stop_the_run_and_keep_the_batch(recipe, tmp_path):
    Poisoned.steps = range(4, 100)
    settings = ["--config", str(recipe(max_skipped_steps=5, checkpoint_every=3))]
    trainer = Poisoned(parse_config(settings))
    with pytest.raises(UserError, match="not finite in the last 5 steps.*logit_scale .*sample_ids"):
        trainer.train()
    batch = load_file(tmp_path / "run/not_finite_0.safetensors")
    assert batch["sample_ids"].shape == (16,) and batch["pixel_values"].dtype == torch.uint8
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_jump_of_the_loss_is_reported_with_its_batch(tmp_path):
    from training.run.guards import Guards
    from training.run.run_logger import RunLogger

    settings = parse_config(["--output_dir", str(tmp_path), "--train_data", "x"])
    guards = Guards(settings, RunLogger(tmp_path), 0, 0, torch.device("cpu"))
    losses = [2 + 0.1 * (-1) ** i for i in range(30)] + [float("nan"), 2.2, 4.0, 2.0]
    said = [
        guards.spike({"step": i, "loss": loss, "logit_scale": 20.0, "grad_norm": 1.0}, torch.tensor([7, i]))
        for i, loss in enumerate(losses)
    ]
    assert [i for i, sentence in enumerate(said) if sentence] == [32] and "Loss 4 at step 32 after 2.0" in said[32]
    (report,) = (json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").open())
    assert report["sample_ids"] == [7, 32] and report["step"] == 32


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(recipe, rows, tmp_path, kills):
    """Two processes on shards, `kill -9` to all of them at once, at any moment and also while they save."""
    write_shards(rows, tmp_path / "shards")
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        shuffle="shards",
        shuffle_buffer=50,
        checkpoint_every=3,
        num_train_epochs=4 * kills,
        per_device_train_batch_size=8,
        dataloader_num_workers=1,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["training/pretrain.py", "--config", str(path), "--output_dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment_with_threads(1))
    assert subprocess.run([*command, str(whole)], **options).returncode == 0
    total = len(read_metrics(whole))
    assert total == 48 * kills
    done = again = 0
    for kill in range(kills):
        resume = ["--resume_from_checkpoint", "latest"] if (killed / "run_config.yaml").exists() else []
        process = subprocess.Popen([*command, str(killed), *resume], **options)
        goal = done + random.randint(1, max(1, 2 * (total - done) // (kills - kill + 1)))
        deadline = time.time() + 120
        while done < goal and process.poll() is None and time.time() < deadline:
            time.sleep(0.001)
            metrics = killed / "metrics.jsonl"
            done = metrics.read_text().count("\n") if metrics.exists() else 0
        if process.poll() is None:
            time.sleep(random.random() / 20)
            again += 1
            launcher = psutil.Process(process.pid)
            family = [launcher, *launcher.children(recursive=True)]  # torchrun's processes have sessions of their own
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family[1:], timeout=30)
        process.wait()
    assert again >= kills - 1, "runs ended before they were killed"
    assert subprocess.run([*command, str(killed), "--resume_from_checkpoint", "latest"], **options).returncode == 0
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_weights(killed, whole)
