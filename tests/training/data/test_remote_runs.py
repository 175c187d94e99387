"""Long checks of remote shards: speed behind a slow connection, an outage, and runs that are killed twenty times.

    python -m pytest -m slow tests/training/data/test_remote_runs.py

REMOTE_PAIRS names another parquet file of pairs than the demo's.
"""

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest

import training.data.index_cache
import training.data.remote
from tests.helpers.checkout import DEMO, ROOT, environment_with_threads
from tests.helpers.runs import assert_same_weights, read_metrics, train
from tests.helpers.shards import PLAIN, make_config, select_rows, write_shards
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler


NUM_SHARDS, BATCH_SIZE, WINDOW = 20, 64, 1000
PATTERN = "{00000..00019}.tar"
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    source = os.environ.get("REMOTE_PAIRS", str(DEMO / "train.parquet"))
    rows = datasets.load_dataset("parquet", data_files=source, split="train")
    folder = tmp_path_factory.mktemp("remote") / "shards"
    write_shards(select_rows(rows, len(rows)), folder, shares=[1 / NUM_SHARDS] * NUM_SHARDS)
    return folder


class ServerProcess:
    """A server of shards with a latency of 50 ms, in a process of its own that can be killed."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        command = [sys.executable, "-m", "tests.helpers.shard_server", self.folder, "--latency", "0.05"]
        command += ["--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.rpartition(":")[2])

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(shards):
    server = ServerProcess(shards)
    yield server
    server.kill()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for module in (training.data.index_cache, training.data.remote):
        monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/amorlip/shards"


def collect(samples):
    return [(sample.sample_id, sample.caption, len(sample.bad_samples)) for sample in samples]


def open_loader(source, limit):
    """Return a loader of a source, without any shards in the cache, and the number of batches of an epoch."""
    config = make_config(
        source,
        shuffle="shards",
        shuffle_buffer=WINDOW,
        shard_cache_size=limit / 1e9,
        dataloader_num_workers=1,
        per_device_train_batch_size=BATCH_SIZE,
    )
    pairs = open_pairs(config)
    sampler = PairSampler(EpochOrder(pairs, config), len(pairs), BATCH_SIZE, 1, 0)
    return make_dataloader(pairs, config, 48, collect, sampler), sampler.steps_per_epoch


def cache_limit(shards):
    return int(0.4 * sum(path.stat().st_size for path in shards.iterdir()))


def empty(cache):
    for path in cache.glob("*.tar"):
        path.unlink()


def time_after_first_window(loader, steps):
    """Return samples per second of an epoch after its first window."""
    batches = iter(loader)
    for _ in range(-(-WINDOW // BATCH_SIZE)):
        next(batches)
    start = time.perf_counter()
    rest = steps - -(-WINDOW // BATCH_SIZE)
    for _ in range(rest):
        next(batches)
    return rest * BATCH_SIZE / (time.perf_counter() - start)


def test_remote_shards_are_as_fast_as_local_ones(server, shards, cache):
    limit = cache_limit(shards)
    remote, steps = open_loader(f"{server.address}/{PATTERN}", limit)
    local, _ = open_loader(shards, limit)
    sizes, is_done = [], threading.Event()

    def watch():
        while not is_done.wait(0.05):
            sizes.append(sum(path.stat().st_size for path in list(cache.glob("*.tar")) if path.exists()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    ratios = []
    for _ in range(5):
        reference = time_after_first_window(local, steps)
        empty(cache)
        ratios.append(time_after_first_window(remote, steps) / reference)
    is_done.set()
    watcher.join()
    print(f"remote / local samples per second: {[round(ratio, 3) for ratio in ratios]}, {reference:.0f} local")
    print(f"largest cache: {max(sizes) / limit:.2f} of its limit")
    assert max(sizes) <= limit
    assert statistics.median(ratios) >= 0.9


def test_a_server_that_is_killed_for_twenty_seconds_costs_no_sample(server, shards, cache):
    local, steps = open_loader(shards, cache_limit(shards))
    expected = list(itertools.islice(local, 2 * steps))
    remote, _ = open_loader(f"{server.address}/{PATTERN}", cache_limit(shards))
    empty(cache)
    read = []
    for step, batch in enumerate(itertools.islice(remote, 2 * steps)):
        read.append(batch)
        if step == steps // 2:
            server.kill()
            threading.Timer(20, server.start).start()
    assert read == expected


def test_twenty_kills_over_remote_shards_resume_exactly(recipe, server, shards, tmp_path):
    path = recipe(
        **PLAIN,
        train_data=f"{server.address}/{PATTERN}",
        shuffle="shards",
        shuffle_buffer=WINDOW,
        shard_cache_size=cache_limit(shards) / 1e9,
        max_steps=int(os.environ.get("REMOTE_STEPS", 3000)),
        checkpoint_every=20,
        dataloader_num_workers=1,
    )
    environment = {**environment_with_threads(1), "HF_HOME": str(tmp_path / "home")}
    generator = random.Random(0)
    hurt, whole = tmp_path / "hurt", tmp_path / "whole"
    kills = 0
    for _ in range(100):
        command = [sys.executable, "training/pretrain.py", "--config", path, "--output_dir", hurt]
        if (hurt / "run_config.yaml").exists():
            command += ["--resume_from_checkpoint", "latest"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            # Counted from the first step of this start, so that slow machines are killed in their steps as well.
            wait_for_step(process, hurt)
            process.wait(generator.uniform(0, 4) if kills < 20 else 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            for copy in random.Random(kills).sample(sorted((tmp_path / "home/amorlip/shards").glob("*.tar")), 2):
                copy.unlink()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills == 20
    train(path, "--output_dir", whole, "--train_data", str(shards), "--shard_cache_size", 50)
    assert read_metrics(hurt) == read_metrics(whole)
    assert_same_weights(hurt, whole)


def wait_for_step(process, folder):
    """Wait until a run logs a step, or ends."""
    metrics = folder / "metrics.jsonl"
    start = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns > start and metrics.stat().st_size:
            return
        time.sleep(0.01)
