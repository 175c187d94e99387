"""Pairs of tars: nothing is lost in silence, captions are read without images, and the index survives damage."""

import json
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

import training.data.index_cache
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import make_config, write_tar
from training.data.index_cache import IndexCache
from training.data.mixture import open_pairs
from training.data.shards import LocalFile, LocalShards, ShardError
from training.data.webdataset import TarPairs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of indices."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(training.data.index_cache, "HF_HOME", str(folder))
    return folder / "amorlip"


@pytest.fixture
def shards(tmp_path):
    """Two shards of three pairs, whose json holds captions, lists, texts and groups."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = []
        for i in range(3):
            about = {"caption": f"json {shard}{i}", "tags": ["a", "b"], "kind": "c", "parts": {"d": 1}}
            members += [(f"{i}.png", bytes([shard, i]) * 3000), (f"{i}.txt", f"text {shard}{i}".encode())]
            members.append((f"{i}.json", json.dumps(about).encode()))
        write_tar(folder / f"{shard}.tar", members)
    return folder


def test_pairs_have_their_columns_and_keys(shards):
    pairs = open_pairs(make_config(shards, keywords_column="tags"))
    row = pairs[4]
    assert row["image"] == bytes([1, 1]) * 3000 and row["caption"] == "text 11" and row["tags"] == ["a", "b"]
    assert pairs.describe(4) == ("1", str(shards / "1.tar"))
    assert list(pairs.captions()) == [f"text {s}{i}" for s in range(2) for i in range(3)]
    assert pairs.column("kind") == ["c"] * 6
    (line,) = pairs.report()
    assert line == f"{shards}: 6 pairs in 2 shards"


def test_captions_and_columns_are_read_without_images(shards, monkeypatch):
    pairs = open_pairs(make_config(shards, keywords_column="tags"))
    lengths = []
    read = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda file, *place: lengths.append(place[1]) or read(file, *place))
    assert len(list(pairs.captions())) == len(pairs.column("kind")) == 6
    assert max(lengths) < 100


def test_captions_lose_a_byte_order_mark(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", b"x"), ("a.txt", "\ufeffa cat".encode())])
    assert open_pairs(make_config(tmp_path))[0]["caption"] == "a cat"


def test_the_number_of_a_class_is_no_caption_beside_json(tmp_path):
    about = json.dumps({"caption": "a cat"}).encode()
    write_tar(
        tmp_path / "0.tar", [("a.png", b"x"), ("a.cls", b"3"), ("a.json", about), ("b.png", b"x"), ("b.cls", b"4")]
    )
    pairs = open_pairs(make_config(tmp_path))
    assert list(pairs.captions()) == ["a cat", "4"]
    assert "1 members of a pair in a second format" in pairs.report()[0]


def test_tars_that_a_folder_holds_besides_are_told(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", b"x"), ("a.txt", b"a")])
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more/1.tar", [("b.png", b"x"), ("b.txt", b"b")])
    (line,) = open_pairs(make_config(tmp_path)).report()
    assert "1 pairs in 1 shard" in line and "not read: 1 tar in its subfolders" in line
    (tmp_path / "more/2.tar.gz").write_bytes(b"compressed")
    assert len(open_pairs(make_config(tmp_path))) == 1
    for folder in (tmp_path / "more", tmp_path):
        (folder / "3.tgz").write_bytes(b"compressed")
        with pytest.raises(UserError, match="holds compressed tars .*gz.*: decompress them"):
            open_pairs(make_config(folder))


def test_the_report_counts_what_is_left_out(shards):
    write_tar(shards / "2.tar", [("a.jpg", b""), ("b.txt", b""), ("c.npy", b""), ("d.jpg", b""), ("d.txt", b"d")])
    content = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(content[:6000])
    (line,) = open_pairs(make_config(shards)).report()
    assert "4 pairs in 3 shards" in line and "1 damaged shard" in line and f"{shards / '1.tar'}: cut off" in line
    for cause in ("1 images without a caption", "1 captions without an image", "1 .npy members"):
        assert cause in line


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"group_column": "concpt"}, "group_column 'concpt' is not in .*; its columns: .'caption', 'image', 'kind'"),
        ({"keywords_column": "tag"}, "keywords_column 'tag' is not in"),
        ({"caption_column": "captions"}, "caption_column 'captions' is not in"),
        ({"further_caption_columns": ["alt"]}, "further_caption_columns 'alt' is not in"),
        ({"keywords_column": "kind"}, "keywords_column 'kind' .* holds text; it must hold lists of texts"),
        ({"alternative_captions_column": "caption"}, "holds text; it must hold lists of texts"),
        ({"group_column": "tags"}, "group_column 'tags' .* holds lists, not single values"),
    ],
)
def test_mistyped_columns_are_refused(shards, setting, message):
    with pytest.raises(UserError, match=message):
        open_pairs(make_config(shards, **setting))


def test_tars_without_pairs_are_refused_with_the_causes(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"a"), ("b.txt", b"b")])
    with pytest.raises(UserError, match="has no pairs .*: 1 captions without an image, 1 images without a caption"):
        open_pairs(make_config(tmp_path))


def test_the_index_is_made_once_and_again_when_a_shard_changes(shards, cache, monkeypatch):
    scans = []
    scan = training.data.index_cache.scan_file
    monkeypatch.setattr(training.data.index_cache, "scan_file", lambda *args: scans.append(args[1]) or scan(*args))
    paths = [str(shards / f"{i}.tar") for i in range(2)]
    IndexCache(LocalShards(paths))
    assert len(list(cache.glob("*.idx"))) == len(scans) == 2
    IndexCache(LocalShards(paths))
    assert len(scans) == 2
    write_tar(shards / "1.tar", [("x.png", b"x"), ("x.txt", b"x")])
    assert [summary.num_pairs for summary in IndexCache(LocalShards(paths)).summaries] == [3, 1]
    assert scans[2:] == [1]


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped start", "flipped pair", "foreign"])
def test_a_damaged_index_is_made_again(shards, cache, harm):
    expected = [open_pairs(make_config(shards))[i] for i in range(6)]
    for path in cache.glob("*.idx"):
        content = bytearray(path.read_bytes())
        if harm == "cut":
            content = content[:-5]
        elif harm == "foreign":
            content = b"something else" * 100
        elif harm == "empty":
            content = b""
        else:
            content[20 if harm == "flipped start" else -40] ^= 1
        path.write_bytes(content)
    pairs = open_pairs(make_config(shards))
    assert [pairs[i] for i in range(6)] == expected
    again = IndexCache(LocalShards([str(shards / "0.tar")]))
    assert again.places(0, 0).text.size == len("text 00") and not again._in_memory


def test_an_unwritable_cache_is_told_and_done_without(shards, cache, monkeypatch):
    cache.parent.write_text("a file where the folder would be")
    pairs = open_pairs(make_config(shards))
    assert "indices stay in memory" in pairs.report()[0]
    copy = pickle.loads(pickle.dumps(pairs))
    assert [copy[i]["caption"] for i in range(6)] == [pairs[i]["caption"] for i in range(6)]


def test_workers_receive_nothing_per_pair(tmp_path):
    sizes = []
    for number in (10, 1000):
        path = tmp_path / f"{number}.tar"
        write_tar(path, [(f"{i}.{e}", b"x") for i in range(number) for e in ("png", "txt")])
        pairs = TarPairs(LocalShards([str(path)]), str(path), make_config(path))
        sizes.append(len(pickle.dumps(pairs)))
        assert pickle.loads(pickle.dumps(pairs))[number - 1]["caption"] == "x"
    assert abs(sizes[1] - sizes[0]) < 50


def test_a_shard_that_changes_after_the_start_fails_by_pair(shards, cache):
    pairs = open_pairs(make_config(shards))
    write_tar(shards / "0.tar", [("x.png", b"x"), ("x.txt", b"x")])
    for damage in (False, True):
        worker = pickle.loads(pickle.dumps(pairs))
        if damage:
            for path in cache.glob("*.idx"):
                path.unlink()
        with pytest.raises(ShardError, match="was changed since the run began"):
            worker[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_shards_are_named(shards):
    (shards / "0.tar").chmod(stat.S_IWUSR)
    with pytest.raises(UserError, match="0.tar"):
        open_pairs(make_config(shards))


def test_processes_of_a_node_make_an_index_once(shards, cache, monkeypatch):
    scans = []
    scan = training.data.index_cache.scan_file
    monkeypatch.setattr(training.data.index_cache, "scan_file", lambda *args: scans.append(args[1]) or scan(*args))
    local = LocalShards([str(shards / f"{i}.tar") for i in range(2)])
    with ThreadPoolExecutor(4) as pool:  # each has its own lock, as processes have
        caches = list(pool.map(lambda _: IndexCache(local), range(4)))
    assert sorted(scans) == [0, 1]
    assert all([summary.num_pairs for summary in cache.summaries] == [3, 3] for cache in caches)


def test_long_keys_are_told_in_full(tmp_path):
    keys = [f"{'folder/' * 40}{i}" for i in range(2)]
    write_tar(tmp_path / "0.tar", [(f"{key}.{e}", b"x") for key in keys for e in ("png", "txt")])
    pairs = open_pairs(make_config(tmp_path))
    assert [pairs.describe(i)[0] for i in range(2)] == keys
