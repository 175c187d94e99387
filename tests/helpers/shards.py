"""Image-text pairs to test with, in every form that they can be stored in."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from training.config import PretrainConfig


PLAIN = {"alternative_captions_column": None, "keywords_column": None, "group_column": None}
"""Settings for data without the columns that the demo set has."""

UNEVEN = (0.3, 0.02, 0.18, 0.1, 0.25, 0.05, 0.1)
"""Shares of the pairs in each shard."""


def make_config(train_data: Any, **changes: Any) -> PretrainConfig:
    """Return the configuration of a run that only reads data."""
    return PretrainConfig(output_dir="unused", train_data=str(train_data), **changes)


def select_rows(demo_rows: datasets.Dataset, number: int) -> list[dict[str, Any]]:
    """Return the first demo pairs as {image: {bytes}, caption}."""
    raw = demo_rows.cast_column("image", datasets.Image(decode=False)).select(range(number))
    return [{"image": {"bytes": row["image"]["bytes"]}, "caption": row["caption"]} for row in raw]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of members, given as (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(rows: Sequence[dict[str, Any]], folder: Path, shares: Sequence[float] = UNEVEN) -> None:
    """Write pairs as img2dataset does, in shards of uneven size."""
    folder.mkdir()
    ends = np.rint(np.cumsum([0, *shares]) * len(rows)).astype(int)
    for number, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        members = []
        for i in range(start, end):
            about = {"caption": rows[i]["caption"], "key": f"{i:09d}", "labels": ["thing", str(i)]}
            members += [(f"{i:09d}.png", rows[i]["image"]["bytes"]), (f"{i:09d}.txt", rows[i]["caption"].encode())]
            members.append((f"{i:09d}.json", json.dumps(about).encode()))
        write_tar(folder / f"{number:05d}.tar", members)


def write_forms(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Write pairs as WebDataset, parquet, image folder, CSV and TSV; return {form: train_data}."""
    write_shards(rows, folder / "shards")
    table = datasets.Dataset.from_list(list(rows)).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pairs.parquet")
    images = folder / "images/train"
    images.mkdir(parents=True)
    for i, row in enumerate(rows):
        (images / f"{i:06d}.png").write_bytes(row["image"]["bytes"])
    names = [(f"{i:06d}.png", row["caption"]) for i, row in enumerate(rows)]
    for path, header, prefix, separator in (
        (images / "metadata.csv", ("file_name", "caption"), "", ","),
        (folder / "pairs.csv", ("filepath", "title"), "images/train/", ","),
        (folder / "pairs.tsv", ("filepath", "title"), f"{images}/", "\t"),
    ):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(header)
            writer.writerows([(prefix + name, caption) for name, caption in names])
    return {
        "webdataset": folder / "shards",
        "parquet": folder / "pairs.parquet",
        "folder": folder / "images",
        "csv": folder / "pairs.csv",
        "tsv": folder / "pairs.tsv",
    }
