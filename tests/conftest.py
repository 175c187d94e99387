"""Fixtures on small real data: emoji of the demo set, recipes and a model that is trained in seconds."""

import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.helpers.checkout import DEMO, TINY, pretrain


os.environ["HF_HUB_OFFLINE"] = "1"  # before the client is imported, which reads it then
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # torch before 2.8 starts processes for more

import datasets
import pytest
import torch
import yaml


torch.set_num_threads(1)  # as many workers of pytest-xdist as cores share the machine


def pytest_configure(config):
    """Let pytest-xdist, where it is installed, keep the order of the files, which it sorts by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Run tests marked `slow` or `interop` only where `-m` names the mark, and files with `e2e` tests first.

    These take longest: at the end they would keep one worker busy while the others have nothing to do.
    """
    marks = {mark for mark in ("slow", "interop") if mark not in config.option.markexpr}
    skipped = [item for item in items if marks.intersection(mark.name for mark in item.iter_markers())]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in set(skipped)]
    long_files = Counter(item.path for item in items if item.get_closest_marker("e2e"))
    items.sort(key=lambda item: -long_files[item.path])


@pytest.fixture(autouse=True)
def no_process_of_its_own(request, monkeypatch):
    """Refuse a Python process in tests that are not marked `e2e`, so that `pytest -m "not e2e"` stays fast."""
    if request.node.get_closest_marker("e2e"):
        return
    popen = subprocess.Popen

    class Popen(popen):
        def __init__(self, args, *rest, **options):
            words = args.split() if isinstance(args, str) else [os.fspath(word) for word in args]
            assert sys.executable not in words, "Mark this test `e2e`, or call the code in this process."
            super().__init__(args, *rest, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)


@pytest.fixture(scope="session")
def no_training_curves():
    """Leave out the plot at the end of training runs, which takes as long as ten steps of a tiny one."""
    from training import trainer  # here, since environments of other libraries lack what training needs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_curves", lambda logs, path: None)
        yield


@pytest.fixture(scope="module")
def training_curves(no_training_curves):
    """Let the runs of a module draw their curves."""
    from eval import plots
    from training import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_curves", plots.training_curves)
        yield


@pytest.fixture(scope="session")
def demo_rows():
    """Return the demo's training pairs."""
    return datasets.load_dataset("parquet", data_files=str(DEMO / "train.parquet"), split="train")


@pytest.fixture(scope="session")
def small_data(demo_rows, tmp_path_factory):
    """Return a parquet file of 100 pairs."""
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    demo_rows.select(range(100)).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def recipe_factory(no_training_curves, small_data):
    """Return a function that writes a tiny recipe with changes into a folder, and returns its path."""

    def write(folder: Path, **changes) -> Path:
        values = {**TINY, "train_data": str(small_data), "output_dir": str(folder / "run"), **changes}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def recipe(recipe_factory, tmp_path):
    """Return a function that writes a tiny recipe with changes, and returns its path."""
    return functools.partial(recipe_factory, tmp_path)


@pytest.fixture(scope="session")
def tiny_model(recipe_factory, tmp_path_factory):
    """Return the folder of a tiny model, trained for 18 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    result = pretrain(recipe_factory(folder))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def emoji_files(tmp_path):
    """Return a folder of 40 emoji as PNG files in two subfolders, named by their captions; every third has alpha."""
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train").select(range(40))
    for i, row in enumerate(rows):
        folder = tmp_path / "emoji" / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        image = row["image"].convert("RGBA")
        image.putalpha(255 if i % 3 else 120)
        image.save(folder / f"{rows.features['label'].int2str(row['label'])}.png")
    return tmp_path / "emoji"
