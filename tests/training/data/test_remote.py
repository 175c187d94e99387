"""Remote shards give the batches of local ones, in a cache of limited size, whatever the server does."""

import base64
import functools
import hashlib
import itertools
import pickle
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
import torch
from huggingface_hub import HfFileSystem

import training.data.index_cache
import training.data.mixture
import training.data.remote
import training.data.shard_cache
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import start_run
from tests.helpers.hub_server import Hub, Repository, connect
from tests.helpers.runs import assert_same_weights, read_metrics, train
from tests.helpers.shard_server import ShardServer
from tests.helpers.shards import PLAIN, make_config, write_shards
from training.data.checksums import Checksum, read_checksum
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.data.prefetch import PrefetchingSampler
from training.data.shard_cache import RemoteFile, ShardCache
from training.data.shards import ShardError
from training.run.checkpointing import list_checkpoints


SHARDS = "{00000..00006}.tar"
MD5_OF_ABC = "900150983cd24fb0d6963f7d28e17f72"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of shards, and no waiting."""
    for module in (training.data.index_cache, training.data.remote):
        monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(training.data.shard_cache, "FIRST_WAIT", 0.001)
    return tmp_path / "cache/amorlip/shards"


@pytest.fixture
def server(rows, tmp_path):
    """A server of seven shards of 100 pairs."""
    write_shards(rows, tmp_path / "shards")
    server = ShardServer(tmp_path / "shards")
    yield server
    server.close()


def read_batches(source, number=5, num_workers=0, **changes):
    config = make_config(source, shuffle="shards", shuffle_buffer=30, dataloader_num_workers=num_workers, **changes)
    pairs = open_pairs(config)
    sampler = PairSampler(EpochOrder(pairs, config), len(pairs), 20, 1, 0)
    loader = make_dataloader(pairs, config, 16, lambda samples: samples, sampler)
    return list(itertools.islice(loader, number))


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        for sample, reference in zip(batch, other, strict=True):
            assert torch.equal(sample.image, reference.image) and sample[1:] == reference[1:]
            assert not sample.bad_samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_give_the_batches_of_local_ones(server, cache, num_workers):
    expected = read_batches(server.folder)
    server.failures = 5
    assert_same(read_batches(f"{server.address}/{SHARDS}", num_workers=num_workers), expected)
    assert set(server.downloads) == {f"{i:05d}.tar" for i in range(7)}
    assert server.failures == 0
    first = len(server.downloads)
    assert_same(read_batches(f"{server.address}/{SHARDS}"), expected)
    assert len(server.downloads) == first  # the cache has them all


def test_servers_without_ranges(server, cache, monkeypatch):
    monkeypatch.setattr(training.data.shard_cache, "CHUNK_BYTES", 10_000)
    server.knows_ranges = False
    assert_same(read_batches(f"{server.address}/{SHARDS}"), read_batches(server.folder))


def test_the_cache_keeps_its_limit(server, cache, monkeypatch):
    sizes = [path.stat().st_size for path in server.folder.iterdir()]
    limit = 2 * max(sizes)
    assert limit < sum(sizes)
    peaks = []
    evict = training.data.shard_cache.ShardCache._evict

    def watch(shard_cache, room):
        evict(shard_cache, room)
        peaks.append(room + sum(path.stat().st_size for path in shard_cache.folder.glob("*.*")))

    monkeypatch.setattr(training.data.shard_cache.ShardCache, "_evict", watch)
    batches = read_batches(f"{server.address}/{SHARDS}", 10, shard_cache_size=limit / 1e9)
    assert_same(batches, read_batches(server.folder, 10))
    # One download at a time passes eviction; the others have reserved their room.
    assert len(peaks) >= 7 and max(peaks) <= limit + 3 * max(sizes)
    with pytest.raises(UserError, match="shuffle samples would download a shard for every pair"):
        open_pairs(make_config(f"{server.address}/{SHARDS}", shard_cache_size=limit / 1e9))
    with pytest.raises(UserError, match="less than a shard"):
        open_pairs(make_config(f"{server.address}/{SHARDS}", shard_cache_size=1e-6))


def test_shards_are_fetched_ahead_of_the_order(server, cache):
    config = make_config(f"{server.address}/{SHARDS}", shuffle="shards", shuffle_buffer=1)
    pairs = open_pairs(config)
    for path in cache.glob("*.tar"):
        path.unlink()
    server.downloads.clear()
    order = EpochOrder(pairs, config)
    fetched = threading.Event()
    source = pairs.parts[0].shards
    prefetch, names = source.prefetch, []

    def record(shard):
        prefetch(shard)
        names.append(shard)
        if len(names) == 7:
            fetched.set()

    source.prefetch = record
    sampler = PrefetchingSampler(PairSampler(order, len(order), 10, 1, 0), pairs)
    next(iter(sampler))
    assert fetched.wait(60)
    assert len(list(cache.glob("*.tar"))) == 7 and len(server.downloads) == 7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dead_server_ends_the_run_with_a_sentence(server, cache, monkeypatch, num_workers):
    monkeypatch.setattr(training.data.shard_cache, "RETRY_SECONDS", 0.01)
    config = make_config(f"{server.address}/{SHARDS}", shuffle="shards", dataloader_num_workers=num_workers)
    pairs = pickle.loads(pickle.dumps(open_pairs(config)))  # without files that are open already
    for path in cache.glob("*.tar"):
        path.unlink()
    server.close()
    loader = make_dataloader(pairs, config, 16, list, PairSampler(EpochOrder(pairs, config), len(pairs), 20, 1, 0))
    with pytest.raises(ShardError, match="^http.*tar could not be read for 0 s: [^\\n]*$"):
        next(iter(loader))


def test_a_shard_that_changes_ends_the_run(server, cache, rows, tmp_path):
    pairs = open_pairs(make_config(f"{server.address}/{SHARDS}", shuffle="shards"))
    for path in cache.glob("*.tar"):
        path.unlink()
    shard = server.folder / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="00000.tar was changed since the run began"):
        pickle.loads(pickle.dumps(pairs))[0]
    assert pairs[40]["caption"] == rows[40]["caption"]


def test_an_outage_loses_and_repeats_no_sample(server, cache):
    expected = read_batches(server.folder, 10)
    config = make_config(f"{server.address}/{SHARDS}", shuffle="shards", shuffle_buffer=30, dataloader_num_workers=0)
    pairs = open_pairs(config)
    sampler = PairSampler(EpochOrder(pairs, config), len(pairs), 20, 1, 0)
    worker = pickle.loads(pickle.dumps(pairs))  # without files that are open already
    batches = iter(make_dataloader(worker, config, 16, list, sampler))
    read = [next(batches) for _ in range(3)]
    for path in cache.glob("*.tar"):
        path.unlink()
    worker.parts[0].files.clear()
    timer = server.go_away(0.3)
    read += [next(batches) for _ in range(7)]
    timer.join()
    assert_same(read, expected)


def test_copies_that_arrive_damaged_are_copied_again(server, cache, monkeypatch):
    for path in server.folder.iterdir():
        digest = base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
        server.headers[path.name] = {"Content-MD5": digest}
    server.corruptions = 3
    assert_same(read_batches(f"{server.address}/{SHARDS}"), read_batches(server.folder))
    assert server.corruptions == 0
    monkeypatch.setattr(training.data.shard_cache, "RETRY_SECONDS", 0.01)
    for path in cache.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-1000])  # after a crash of the system
    assert_same(read_batches(f"{server.address}/{SHARDS}"), read_batches(server.folder))
    server.headers["00003.tar"] = {"Content-MD5": base64.b64encode(bytes(16)).decode()}
    for path in cache.glob("*.tar"):
        path.unlink()
    for path in cache.parent.glob("*.idx"):
        path.unlink()
    with pytest.raises(ShardError, match=f"00003.tar could not .*: it arrived damaged: .* in the store {'0' * 32}"):
        open_pairs(make_config(f"{server.address}/{SHARDS}", shuffle="shards"))


def test_an_etag_of_s3_that_is_no_md5_is_done_without(tmp_path):
    content = b"content of an object that is encrypted by KMS"
    reads = []
    checksum = Checksum("md5", "0" * 32, is_certain=False)
    cache = ShardCache(tmp_path, 1000)
    for name in ("s3://bucket/0.tar", "s3://bucket/1.tar"):
        read = functools.partial(lambda name, start, end: reads.append(name) or content[start:end], name)
        file = RemoteFile(name, len(content), "v", checksum, read, lambda: (len(content), "v"))
        assert cache.open(file).read(0, 100) == content
    assert reads == ["s3://bucket/0.tar"] * 2 + ["s3://bucket/1.tar"]


@pytest.mark.parametrize(
    "address, info, expected",
    [
        ("s3://b/k", {"ETag": '"900150983cd24fb0d6963f7d28e17f72"'}, Checksum("md5", MD5_OF_ABC, is_certain=False)),
        ("s3://b/k", {"ETag": '"900150983cd24fb0d6963f7d28e17f72-2"'}, None),
        ("https://h/k", {"ETag": '"900150983cd24fb0d6963f7d28e17f72"'}, None),
        ("https://h/k", {"Content-MD5": "kAFQmDzST7DWlj99KOF/cg=="}, Checksum("md5", MD5_OF_ABC)),
        ("https://h/k", {"Digest": "sha=x, md5=kAFQmDzST7DWlj99KOF/cg=="}, Checksum("md5", MD5_OF_ABC)),
        ("https://h/k", {"Content-MD5": "not base64"}, None),
        ("gs://b/k", {"md5Hash": "kAFQmDzST7DWlj99KOF/cg=="}, Checksum("md5", MD5_OF_ABC)),
        ("gs://b/composed", {"crc32c": "AAAAAA=="}, None),
        ("az://b/k", {"content_settings": {"content_md5": bytes.fromhex(MD5_OF_ABC)}}, Checksum("md5", MD5_OF_ABC)),
        ("hf://datasets/a/b/k", {"lfs": SimpleNamespace(sha256="ab" * 32)}, Checksum("sha256", "ab" * 32)),
        ("hf://datasets/a/b/k", {"lfs": None}, None),
    ],
)
def test_checksums_that_stores_give(address, info, expected):
    assert read_checksum(address, info) == expected


def test_tables_are_copied_from_addresses(server, cache, forms, rows):
    for name in ("pairs.parquet", "pairs.csv"):
        shutil.copy(forms["parquet"].parent / name, server.folder / name)
    pairs = open_pairs(make_config(f"{server.address}/pairs.parquet"))
    assert [pairs[i]["caption"] for i in range(100)] == [row["caption"] for row in rows]
    assert pairs[7]["image"] == rows[7]["image"]["bytes"]
    with pytest.raises(UserError, match="names files that are not there .*000000.png"):
        open_pairs(make_config(f"{server.address}/pairs.csv"))


def test_shards_of_the_hub_are_read_by_its_client(rows, cache, tmp_path, monkeypatch):
    write_shards(rows, tmp_path / "shards")
    hub = Hub()
    connect(monkeypatch, hub, tmp_path)
    monkeypatch.setattr(training.data.mixture, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    try:
        repository = hub.repositories["user/pairs"] = Repository(private=False)
        files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()}
        repository.branches["main"] = repository.add(files, "data")
        assert_same(read_batches("hf://datasets/user/pairs/data/*.tar"), read_batches(tmp_path / "shards"))
        with pytest.raises(UserError, match="there is no hf://datasets/user/pairs/no"):
            open_pairs(make_config("hf://datasets/user/pairs/no*.tar"))
    finally:
        hub.close()
        HfFileSystem.clear_instance_cache()


def test_folders_of_images_on_the_hub_keep_their_captions_as_written(rows, tmp_path, monkeypatch):
    hub = Hub()
    connect(monkeypatch, hub, tmp_path)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    try:
        repository = hub.repositories["user/pictures"] = Repository(private=False)
        captions = ["007", "NA", "1.50"]
        files = {f"train/{i}.png": rows[i]["image"]["bytes"] for i in range(3)}
        lines = [f"{i}.png,{caption}" for i, caption in enumerate(captions)]
        files["train/metadata.csv"] = "\n".join(["file_name,caption", *lines]).encode()
        repository.branches["main"] = repository.add(files, "data")
        pairs = open_pairs(make_config("user/pictures"))
        assert list(pairs.parts[0].captions()) == captions
        assert Path(pairs[1]["image"]).read_bytes() == rows[1]["image"]["bytes"]
    finally:
        hub.close()
        HfFileSystem.clear_instance_cache()


@pytest.mark.e2e
def test_a_kill_over_remote_shards_resumes_exactly(recipe, server, cache, tmp_path):
    """The short form of twenty kills, in test_remote_runs.py."""
    path = recipe(
        **PLAIN,
        train_data=f"{server.address}/{SHARDS}",
        shuffle="shards",
        shuffle_buffer=30,
        shard_cache_size=4 * max(path.stat().st_size for path in server.folder.iterdir()) / 1e9,
        num_train_epochs=50,
        max_steps=8,
        lr_scheduler_type="constant",  # the run that is killed is longer, so that it is not over by then
        checkpoint_every=2,
        keep_last=100,
        dataloader_num_workers=1,
    )
    hurt, whole = tmp_path / "hurt", tmp_path / "whole"
    patches = {f"training.data.{module}.HF_HOME": str(tmp_path / "cache") for module in ("index_cache", "remote")}
    (process,) = start_run(path, hurt, "--max_steps", 1000, patches=patches)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, hurt.with_suffix(".log").read_text()
    min(cache.glob("*.tar")).unlink()
    for checkpoint in list_checkpoints(hurt)[1:]:  # those of a slow start would lie after the last step
        shutil.rmtree(checkpoint)
    train(path, "--output_dir", hurt, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", 0)
    train(path, "--output_dir", whole, "--train_data", server.folder, "--dataloader_num_workers", 0)
    assert read_metrics(hurt) == read_metrics(whole)
    assert_same_weights(hurt, whole)


def test_tables_of_the_hub_lie_in_any_folder(rows, tmp_path, monkeypatch):
    folder = tmp_path / "snapshots[1]"
    (folder / "data/more").mkdir(parents=True)
    for place in ("0.parquet", "data/1.parquet", "data/more/2.parquet"):
        datasets.Dataset.from_list(rows[:3]).to_parquet(folder / place)
    allowed = []

    def download(repository, repo_type, allow_patterns):
        allowed.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(training.data.remote, "snapshot_download", download)
    assert len(open_pairs(make_config("hf://datasets/user/pairs/**/*.parquet"))) == 9
    assert "*.parquet" in allowed[0] and "**/*.parquet" in allowed[0]
    assert len(open_pairs(make_config("hf://datasets/user/pairs/data/{1,more/2}.parquet"))) == 6
    with pytest.raises(UserError, match="no.parquet: there is no such file in user/pairs"):
        open_pairs(make_config("hf://datasets/user/pairs/no.parquet"))


def test_other_stores_are_read_through_fsspec(rows, tmp_path, cache):
    write_shards(rows, tmp_path / "shards")
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "shards").iterdir():
        store.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    pairs = open_pairs(make_config("memory://bucket/data/*.tar"))
    assert len(pairs) == 100 and pairs.describe(99)[1].endswith("bucket/data/00006.tar")
    assert [pairs[i]["caption"] for i in range(100)] == [row["caption"] for row in rows]


@pytest.mark.parametrize(
    "source, message",
    [
        ("pipe:aws s3 cp s3://bucket/0.tar -", "commands are not run. Write the address itself, s3://BUCKET"),
        ("http://127.0.0.1:9/0.tar", "http://127.0.0.1:9/0.tar cannot be read"),
        ("memory://nothing/*.tar", "there is no memory://nothing/"),
        ("nosuch://bucket/0.tar", "Protocol not known: nosuch"),
        ("http://127.0.0.1:9/pairs.parquet", "http://127.0.0.1:9/pairs.parquet cannot be read"),
        ("http://127.0.0.1:9/pairs.zip", "only files that are all .tar or all of one of .parquet"),
        ("hf://datasets/owner", "write hf://datasets/OWNER/NAME/PATTERN"),
    ],
)
def test_addresses_that_cannot_be_read(cache, source, message):
    with pytest.raises(UserError, match=message):
        open_pairs(make_config(source))


def test_pairs_of_remote_and_local_sources_mix(server, cache):
    source = f"{server.folder}::{server.address}/00000.tar"
    pairs = open_pairs(make_config(source))
    assert pairs.is_remote and pairs.remote_shards(np.array([3, 100, 129])) == [(1, 0)]
