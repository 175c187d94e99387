"""The checkout under test, and commands run in it as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


DEMO = ROOT / "demo_data/emoji"


TINY = {
    "train_data": "",
    "alternative_captions_column": "captions",
    "keywords_column": "tags",
    "group_column": "concept",
    "augmentation": {"rotation": 10, "color_jitter": 0.2, "zoom": [0.9, 1.1], "horizontal_flip": 0.5},
    "projection_dim": 32,
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,
    },
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": 700,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "objective_args": {"beta_decay_epochs": 2, "reinitialize": True},
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "warmup_steps": 2,
    "log_every": 1,
    "dataloader_num_workers": 0,
}


def run(*command, launch=None, threads=1, timeout=300) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a user does; `launch` is a number of processes."""
    python = [sys.executable]
    if launch:
        # `accelerate launch --cpu` starts several processes through MPI only; torchrun starts them anywhere.
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launch)]
    command = [*python, *map(str, command)]
    environment = with_threads(threads)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment)


def with_threads(threads: int) -> dict[str, str]:
    """An environment; sums come out equal, bit for bit, only with equal numbers of threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def pretrain(recipe_path, *overrides, launch=None) -> subprocess.CompletedProcess:
    return run("training/pretrain.py", "--config", recipe_path, *overrides, launch=launch)


def start(recipe_path, folder, launch=None) -> subprocess.Popen:
    """A run that has done its third step."""
    python = [sys.executable]
    if launch:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launch)]
    process = subprocess.Popen(
        [*python, "training/pretrain.py", "--config", recipe_path, "--output_dir", folder],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=with_threads(1),
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.002)
    return process
