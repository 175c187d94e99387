"""Small real things to test with: emoji of the demo set, a run's arguments, commands as a user types them."""

import functools
import os
from pathlib import Path

from tests.helpers.checkout import DEMO, TINY, pretrain


os.environ["HF_HUB_OFFLINE"] = "1"  # before the client is imported, which reads it then

import datasets
import pytest
import torch
import yaml


torch.set_num_threads(2)


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
