"""Pairs that cannot be used, in a run: replaced, listed, counted; damaged shards give their whole pairs."""

import io
import json
import struct
import zlib

import datasets
import pytest
from PIL import Image

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.runs import build, read_metrics, train
from tests.helpers.shards import PLAIN, write_shards, write_tar


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
    train(path)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").open()]
    assert {entry["key"] for entry in listed} == set(bad) and len(listed) >= 14  # each of both epochs
    assert {entry["shard"] for entry in listed} == {str(tmp_path / "shards/bad.tar")}
    reasons = {entry["key"]: f"{entry['cause']}: {entry['reason']}" for entry in listed}
    for key, reason in {
        "bomb": "Image size (2500000000 pixels) exceeds limit",
        "no_caption": "the caption is ''",
        "long_caption": "a member has 1000000 bytes, more than 400000",
        "not_utf8": "UnicodeDecodeError",
        "no_json": "JSONDecodeError",
        "empty_image": "UnidentifiedImageError",
        "corrupt_jpeg": "OSError",
    }.items():
        assert reason in reasons[key]
    assert all(line["samples_seen"] == 20 * line["step"] for line in read_metrics(tmp_path / "run"))

    with pytest.raises(UserError, match=r"\d pairs could not be used .*more than max_bad_fraction 0.002"):
        train(path, "--output_dir", tmp_path / "strict", "--max_bad_fraction", 0.002)


def test_held_out_pairs_that_are_unusable_are_listed_once(recipe, rows, tmp_path, capsys):
    spoiled = [{**row, "image": {"bytes": b"no image"}} if i % 3 == 0 else row for i, row in enumerate(rows[:60])]
    write_shards(spoiled, tmp_path / "shards")
    path = recipe(
        **PLAIN,
        train_data=str(tmp_path / "shards"),
        validation_samples=20,
        eval_every=1,
        max_steps=2,
        warmup_steps=0,
        max_bad_fraction=1.0,
    )
    trainer = train(path)
    indices = trainer.evaluator.validation_loader.dataset.replacements
    listed = [json.loads(line) for line in (tmp_path / "run/bad_validation_samples.jsonl").open()]
    assert {entry["key"] for entry in listed} == {f"{index:09d}" for index in indices if index % 3 == 0}
    assert {entry["step"] for entry in listed} == {1} and listed[0]["cause"] == "UnidentifiedImageError"
    assert f"{len(listed)} held-out pairs could not be used" in capsys.readouterr().out
    trained = {json.loads(line)["key"] for line in (tmp_path / "run/bad_samples.jsonl").open()}
    assert trained.isdisjoint(entry["key"] for entry in listed)


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_truncated_tar_gives_its_whole_pairs(recipe, rows, tmp_path, cut, capsys):
    write_shards(rows[:100], tmp_path / "shards", shares=(0.5, 0.5))
    shard = tmp_path / "shards/00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(cut * len(content))])
    trainer = train(recipe(**PLAIN, train_data=str(tmp_path / "shards"), max_steps=3))
    assert 50 + 15 < len(trainer.pairs) < 100
    printed = capsys.readouterr().out
    assert f"1 damaged shard: {shard}: cut off" in printed
    for other in (tmp_path / "shards").iterdir():
        other.write_bytes(b"")
    with pytest.raises(UserError, match="has no pairs"):
        build(recipe(**PLAIN, train_data=str(tmp_path / "shards"), output_dir=str(tmp_path / "other")))
