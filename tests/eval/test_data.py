"""Samples of a task: parts for several readers, positions, splits of parquet, labels of any type."""

import json

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.data import find_data
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.tasks import encoded, write_task_shards


def picture(i):
    return Image.new("RGB", (8, 8), (i, 0, 0))


@pytest.fixture
def shards(tmp_path):
    """21 retrieval samples in three shards, in the folder that the task names."""
    samples = [[("png", encoded(picture(i))), ("txt", str(i).encode())] for i in range(21)]
    write_task_shards(tmp_path / "wds_mine", samples, shards=3)
    return find_data(Task("mine", kind="retrieval", repositories=("x/wds_mine",)), tmp_path)


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(picture(i))} for i in range(len(next(iter(columns.values()))))]
    rows = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    rows.to_parquet(path)


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7])
def test_readers_share_batches_that_do_not_depend_on_them(shards, readers):
    whole = {positions for batch in shards.batches(2) if (positions := tuple(p for p, _ in batch))}
    parts = [tuple(p for p, _ in batch) for r in range(readers) for batch in shards.batches(2, r, readers)]
    assert len(parts) == len(set(parts)) and set(parts) == whole
    captions = [sample.captions[0] for sample in shards.samples()]
    assert sorted(captions, key=int) == [str(i) for i in range(21)]


def test_reads_samples_at_positions(shards):
    by_position = {p: sample for batch in shards.batches(4) for p, sample in batch}
    positions = [max(by_position), min(by_position), sorted(by_position)[10]]
    assert [s.captions for s in shards.read(positions)] == [by_position[p].captions for p in positions]


@pytest.mark.parametrize("readers", [1, 3])
def test_table_rows_are_shared(tmp_path, readers):
    write_parquet(tmp_path / "mine.parquet", label=list("abcabcab"))
    data = find_data(Task("mine", data="mine.parquet"), tmp_path)
    samples = {p: s for r in range(readers) for batch in data.batches(3, r, readers) for p, s in batch}
    assert sorted(samples) == list(range(8)) and [samples[p].label for p in range(4)] == [0, 1, 2, 0]
    assert samples[5].decode()[0].getpixel((0, 0)) == (5, 0, 0)


def test_parquet_repository_is_read_by_split(tmp_path):
    write_parquet(tmp_path / "wds_mine/data/test-00000-of-00001.parquet", label=["a", "b"])
    write_parquet(tmp_path / "wds_mine/data/train-00000-of-00001.parquet", label=["b", "a", "c"])
    task = Task("mine", repositories=("x/wds_mine",))
    test, train = find_data(task, tmp_path), find_data(task, tmp_path, "train")
    assert [s.label for s in test.samples()] == [0, 1]
    train.align_labels(test)
    assert train.classes == ["a", "b", "c"] and [s.label for s in train.samples()] == [1, 0, 2]
    with pytest.raises(UserError, match="there is no validation split"):
        find_data(task, tmp_path, "validation")


def test_single_file_has_no_training_split(tmp_path):
    write_parquet(tmp_path / "mine.parquet", label=["a"])
    with pytest.raises(UserError, match="there is no train split, as .* holds the test split alone"):
        find_data(Task("mine", data="mine.parquet"), tmp_path, "train")


def test_class_names_of_a_json_file(tmp_path):
    texts = {"classes": ["zero", "one"], "templates": ["a {}"]}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    task = Task("mine", data="mine.parquet", texts="texts.json")
    for labels in ([1, 0, 1], ["one", "zero", "one"]):
        write_parquet(tmp_path / "mine.parquet", label=labels)
        data = find_data(task, tmp_path)
        assert [s.label for s in data.samples()] == [1, 0, 1] and data.classes == ["zero", "one"]
    write_parquet(tmp_path / "mine.parquet", label=["one", "two"])
    with pytest.raises(UserError, match="row 1: its label 'two' is none of the 2 classes"):
        list(find_data(task, tmp_path).samples())
    for content in ('{"classes": "a b", "templates": ["{}"]}', '{"classes": ["a"]}', "[]"):
        (tmp_path / "texts.json").write_text(content)
        with pytest.raises(UserError, match="texts.json"):
            find_data(task, tmp_path)


def test_missing_column_is_named(tmp_path):
    write_parquet(tmp_path / "mine.parquet", kind=["a"])
    with pytest.raises(UserError, match="there is no column label; there are image, kind"):
        find_data(Task("mine", data="mine.parquet"), tmp_path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("cls", b"1")], "s0_00000: the sample has no image"),
        ([("png", b""), ("cls", b"cat")], "s0_00000: the sample cannot be read: invalid literal for int"),
        ([("png", b""), ("txt", b"\xff")], "s0_00000: the sample cannot be read"),
    ],
)
def test_wrong_sample_is_named(members, message, tmp_path):
    write_task_shards(tmp_path / "wds_mine", [members], shards=1)
    data = find_data(Task("mine", kind="retrieval", repositories=("x/wds_mine",)), tmp_path)
    with pytest.raises(UserError, match=message):
        list(data.samples())


@pytest.mark.parametrize("kind, column", [("classification", "label"), ("retrieval", "caption")])
@pytest.mark.parametrize("is_repository", [True, False])
def test_table_without_rows_is_named(kind, column, is_repository, tmp_path):
    """A download that wrote a schema alone: refused when training or evaluation looks for its data, not after."""
    path = tmp_path / "wds_mine/test-0.parquet"
    write_parquet(path, **{column: ["a"]})
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    source = {"repositories": ("x/wds_mine",)} if is_repository else {"data": "wds_mine/test-0.parquet"}
    with pytest.raises(UserError, match="mine: .*test-0.parquet has no rows"):
        find_data(Task("mine", kind=kind, **source), tmp_path)


def test_empty_file_among_others_costs_nothing(tmp_path):
    folder = tmp_path / "wds_mine"
    for name in ("test-0.parquet", "test-1.parquet"):
        write_parquet(folder / name, label=["a", "b"])
    pq.write_table(pq.read_table(folder / "test-1.parquet").slice(0, 0), folder / "test-1.parquet")
    data = find_data(Task("mine", repositories=("x/wds_mine",)), tmp_path)
    assert len(list(data.samples())) == 2
