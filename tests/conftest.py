"""Small real things to test with: emoji of the demo set, a run's arguments, commands as a user types them."""

import functools
import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before the client is imported, which reads it then

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo_data/emoji"
torch.set_num_threads(2)

TINY = {
    "train_data": "",
    "alternative_captions_column": "captions",
    "keywords_column": "tags",
    "group_column": "concept",
    "augmentation": {"rotation": 10, "color_jitter": 0.2, "zoom": [0.9, 1.1], "horizontal_flip": 0.5},
    "projection_dim": 32,
    "vision_config": {
        "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.1,
    },
    "text_config": {
        "model_type": "clip_text_model", "vocab_size": 700, "max_position_embeddings": 32, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "objective_args": {"beta_decay_epochs": 2, "reinitialize": True},
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "warmup_steps": 2,
    "log_every": 1,
    "dataloader_num_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def demo_rows():
    return datasets.load_dataset("parquet", data_files=str(DEMO / "train.parquet"), split="train")


@pytest.fixture(scope="session")
def small_data(demo_rows, tmp_path_factory):
    """A parquet of 100 pairs."""
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    demo_rows.select(range(100)).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def recipe_factory(small_data):
    """Writes a tiny recipe into a folder, with changes, and returns its path."""

    def write(folder: Path, **changes) -> Path:
        values = {**TINY, "train_data": str(small_data), "output_dir": str(folder / "run"), **changes}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def recipe(recipe_factory, tmp_path):
    return functools.partial(recipe_factory, tmp_path)


@pytest.fixture(scope="session")
def tiny_model(recipe_factory, tmp_path_factory):
    """The folder of a tiny model, trained for 18 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    result = pretrain(recipe_factory(folder))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def emoji_files(tmp_path):
    """A folder of 40 emoji as PNG files in two subfolders, named by their captions; every third is translucent."""
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train").select(range(40))
    for i, row in enumerate(rows):
        folder = tmp_path / "emoji" / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        image = row["image"].convert("RGBA")
        image.putalpha(255 if i % 3 else 120)
        image.save(folder / f"{rows.features['label'].int2str(row['label'])}.png")
    return tmp_path / "emoji"


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
