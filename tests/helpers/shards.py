"""Writes WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np


def write_tar(path: Path, members) -> None:
    """`members` are (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


UNEVEN = (0.3, 0.02, 0.18, 0.1, 0.25, 0.05, 0.1)


def write_shards(rows, folder: Path, shares=UNEVEN) -> None:
    """Pairs as img2dataset writes them, in shards of uneven size."""
    folder.mkdir()
    ends = np.rint(np.cumsum([0, *shares]) * len(rows)).astype(int)
    for number, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        members = []
        for i in range(start, end):
            about = {"caption": rows[i]["caption"], "key": f"{i:09d}", "labels": ["thing", str(i)]}
            members += [(f"{i:09d}.png", rows[i]["image"]["bytes"]), (f"{i:09d}.txt", rows[i]["caption"].encode())]
            members.append((f"{i:09d}.json", json.dumps(about).encode()))
        write_tar(folder / f"{number:05d}.tar", members)


PLAIN = {"alternative_captions_column": None, "keywords_column": None, "group_column": None}
