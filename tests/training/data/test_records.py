"""JSON files and folders of images: every value stays as it is written, and nothing is taken for a table in silence."""

import io
import json
import os

import datasets
import pytest
from PIL import Image

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import make_config
from training.data.dataset import PairDataset
from training.data.mixture import open_pairs


def encode(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [encode(color) for color in ("red", "green", "blue", "white")]
CAPTIONS = [
    ["None", "NA", "007", "1e5"],
    ["001", "002", "007", "1.50"],
    ['"hill', "b", 'hill" c', "d"],
    ["2024-01-01"] * 4,
    ["2024-01-01 10:00:00", "True", "null", "nan"],
]


@pytest.fixture
def folder(tmp_path):
    """Four images, 0.png to 3.png."""
    for i, content in enumerate(FILES):
        (tmp_path / f"{i}.png").write_bytes(content)
    return tmp_path


def read(source, **changes):
    """Return the samples of a source."""
    config = make_config(source, **changes)
    dataset = PairDataset(open_pairs(config), config, 8)
    return [dataset[0, i] for i in range(len(dataset))]


def captions_of(source, **changes) -> list[str]:
    """Return the captions of a source whose images are red, green, blue and white, in this order."""
    samples = read(source, **changes)
    assert not any(sample.bad_samples for sample in samples)
    colors = [sample.image[:, 4, 4].tolist() for sample in samples]
    assert colors == [[255, 0, 0], [0, 128, 0], [0, 0, 255], [255, 255, 255]]
    return [sample.caption for sample in samples]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("captions", CAPTIONS)
def test_captions_are_text_in_every_table_of_text(folder, captions):
    rows = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    named = [{"file_name": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    assert captions_of(write_lines(folder / "a.jsonl", rows)) == captions
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    assert captions_of(folder / "a.json") == captions
    (folder / "a.json").unlink()
    (folder / "a.jsonl").unlink()
    lines = "".join(f"{i}.png,{caption}\n" for i, caption in enumerate(captions))
    (folder / "metadata.csv").write_text(f"file_name,caption\n{lines}")
    assert captions_of(folder) == captions
    (folder / "metadata.csv").unlink()
    write_lines(folder / "metadata.jsonl", named)
    assert captions_of(folder) == captions
    tables = folder / "tables"
    tables.mkdir()
    lines = "".join(f"{folder}/{i}.png,{caption}\n" for i, caption in enumerate(captions))
    (tables / "train.csv").write_text(f"image,caption\n{lines}")
    assert captions_of(tables) == captions


def test_json_columns_may_hold_values_of_several_kinds(folder):
    captions = ["a", 5, ["b", None, "b"], 1.5]
    rows = [{"filepath": f"{i}.png", "title": c, "kind": [i, None, "x", [1]][i]} for i, c in enumerate(captions)]
    path = write_lines(folder / "a.jsonl", rows)
    assert captions_of(path) == ["a", "5", "b", "1.5"]
    assert captions_of(path, image_column="filepath", caption_column="title") == ["a", "5", "b", "1.5"]
    assert open_pairs(make_config(path)).column("kind") == [0, None, "x", "[1]"]
    with pytest.raises(UserError, match="group_column 'knd' is not in .*; its columns: .*'kind'"):
        open_pairs(make_config(path, group_column="knd"))


def test_captions_that_are_missing_or_no_unicode_are_listed(folder):
    lines = ['"a"', '"b \\ud83d"', "null", "NaN"]
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"image": "{i}.png", "caption": {line}}}\r\n\r\n' for i, line in enumerate(lines)))
    samples = read(path)
    assert [bool(sample.bad_samples) for sample in samples] == [False, True, True, True]
    assert "not valid Unicode" in samples[1].bad_samples[0]["reason"]
    assert "the caption is 'nan'" in samples[3].bad_samples[0]["reason"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"image": "0.png"}\n{"image": "1.png"\n', "line 2 cannot be read as JSON .Expecting ',' delimiter"),
        (b'{"image": "0.png"}\n{"caption": "caf\xe9"}\n', r"is not UTF-8 \(line 2: byte 0xe9\).*iconv -f latin1"),
        (b'[\n{"image": "0.png"},\n5]', "entry 2 is '5', which is no object with columns"),
        (b'{\n "image": "0.png"}', "line 1 cannot be read as JSON .* write one object per line"),
        (b"[]", "has no rows"),
    ],
)
def test_json_that_cannot_be_read_names_the_line(folder, content, message):
    (folder / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_pairs(make_config(folder / "a.json"))


def test_a_folder_is_read_as_an_unpacked_tar(folder):
    """img2dataset's output as files: json and txt beside each image, and a table of all."""
    shard = folder / "00000"
    shard.mkdir()
    for i in range(4):
        (folder / f"{i}.png").rename(shard / f"{i}.png")
        (shard / f"{i}.json").write_text(json.dumps({"caption": f"json {i}", "kind": i}))
        (shard / f"._{i}.png").write_bytes(b"of another system")
    (folder / "00000_stats.json").write_text("{}")
    datasets.Dataset.from_dict({"caption": ["a"]}).to_parquet(folder / "00000.parquet")
    assert captions_of(folder) == [f"json {i}" for i in range(4)]
    for i in range(4):
        (shard / f"{i}.txt").write_text(f"\ufefftext {i}\n", encoding="utf-8")
    pairs = open_pairs(make_config(folder, group_column="kind"))
    assert pairs.column("kind") == [0, 1, 2, 3]
    assert "ignored: 1 .parquet members, 1 captions without an image" in pairs.report()[0]
    assert captions_of(folder) == [f"text {i}" for i in range(4)]
    for i, content in enumerate(reversed(FILES)):  # of other names, beside the same texts
        (shard / f"{i}.png").unlink()
        (shard / f"{i}.gif").write_bytes(content)
    assert read(folder)[0].image[:, 4, 4].tolist() == [255, 255, 255]


def test_texts_that_are_not_utf8_are_listed(folder):
    for i, text in enumerate((b"caf\xe9", b"b", b"c", b"d")):
        (folder / f"{i}.txt").write_bytes(text)
    samples = read(folder)
    assert "not valid Unicode" in samples[0].bad_samples[0]["reason"]
    assert [sample.caption for sample in samples[1:]] == ["b", "c", "d"]


def test_splits_of_folders_are_checked(folder):
    for split in ("train", "val"):
        (folder / split).mkdir()
        for i in range(4):
            (folder / split / f"{i}.png").write_bytes(FILES[i])
            (folder / split / f"{i}.txt").write_text(f"{split} {i}")
    assert captions_of(folder) == [f"train {i}" for i in range(4)]
    assert captions_of(folder, train_split="validation") == [f"val {i}" for i in range(4)]
    with pytest.raises(UserError, match="train_split 'test' is not in .*its splits: .'train', 'val'"):
        open_pairs(make_config(folder, train_split="test"))
    with pytest.raises(UserError, match="train_split 'test' is not in .*a folder without splits"):
        open_pairs(make_config(folder / "val", train_split="test"))
    rows = [{"file_name": f"val/{i}.png", "caption": f"named {i}"} for i in range(3)]
    write_lines(folder / "metadata.jsonl", [*rows, {"file_name": "train/0.png", "caption": "x"}])
    pairs = open_pairs(make_config(folder, train_split="val"))
    assert [pairs[i]["caption"] for i in range(3)] == [f"named {i}" for i in range(3)] and len(pairs) == 3
    assert "ignored: 1 images that no metadata names" in pairs.report()[0]


def test_linked_folders_are_read_once(folder, tmp_path_factory):
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"caption {i}")
    links = tmp_path_factory.mktemp("links")
    os.symlink(folder, links / "link")
    os.symlink(links, links / "loop")
    assert captions_of(links) == [f"caption {i}" for i in range(4)]
