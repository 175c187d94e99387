"""Samples of a task from the public layouts (WebDataset tars, parquet) or through `datasets`, one after the other.

A folder in the WebDataset layout holds `test/0.tar ...`, `test/nshards.txt`, `classnames.txt` and
`zeroshot_classification_templates.txt`; the members of a sample share the name up to the first dot. Tars are read as
streams and nothing is ever extracted.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from PIL import Image

from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError


HUB = Path("hub")
"""The `data_dir` that stands for repositories of the Hub."""
IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


@dataclass
class Sample:
    """An undecoded image with what the task knows of it; an instance of WinoGAViL has several images."""

    images: list[bytes | Image.Image]
    label: int = -1
    captions: list[str] = field(default_factory=list)
    metadata: np.ndarray | None = None
    cue: str = ""
    associations: list[int] = field(default_factory=list)

    def decode(self) -> list[Image.Image]:
        return [i if isinstance(i, Image.Image) else Image.open(io.BytesIO(i)) for i in self.images]


@dataclass
class TaskData:
    """Where a task's data was found; `samples()` reads it anew each time."""

    task: Task
    path: str
    classes: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    repository: str | None = None  # of the Hub, that shards are fetched from when it is their turn
    rows: datasets.Dataset | None = None
    missing_shards: int = 0

    def samples(self) -> Iterator[Sample]:
        return (_sample_of_row(row, self.task) for row in self.rows) if self.rows is not None else self._from_tars()

    def _from_tars(self) -> Iterator[Sample]:
        for shard in self.shards:
            if self.repository:
                shard = Path(_from_hub(hf_hub_download, self.repository, filename=shard.as_posix()))
            for key, members in read_tar(shard):
                image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
                if image is None:
                    raise UserError(f"{shard}: sample {key} has no image ({', '.join(members)}).")
                text = members.get("txt", b"").decode("utf-8")
                yield Sample(
                    [image],
                    label=int(members.get("cls", b"-1")),
                    captions=[line for line in text.split("\n") if line],
                    metadata=np.load(io.BytesIO(members["npy"]), allow_pickle=False) if "npy" in members else None,
                )


def find_data(task: Task, data_dir: Path, split: str | None = None) -> TaskData:
    """The task's data below `data_dir`, or straight from the Hub if that is `HUB`.

    Args:
        split: of the data, else the one that the task is evaluated on.

    Raises:
        UserError: there is none, or it lacks its class names.
    """
    split = split or task.split
    if task.data:
        return _through_datasets(task, data_dir, split)
    if data_dir == HUB:
        return _on_hub(task, split)
    names = [repository.split("/")[-1] for repository in task.repositories]
    folder = next((data_dir / name for name in names if (data_dir / name).is_dir()), None)
    if folder is None:
        raise UserError(
            f"{task.name}: no folder {' or '.join(names)} in {data_dir}; get it with --download {task.name}."
        )
    if parquet := sorted(map(str, folder.rglob("*.parquet"))):
        rows = datasets.load_dataset("parquet", data_files=parquet, split="train")
        return TaskData(task, str(folder), rows=rows)
    return _from_shards(task, folder, split, list((folder / split).glob("*.tar")))


def _from_shards(task: Task, folder: Path, split: str, shards: list[Path]) -> TaskData:
    """Data in the WebDataset layout, whose text files lie in `folder`."""
    if not shards:
        raise UserError(f"{task.name}: {folder} holds neither {split}/*.tar nor *.parquet.")
    expected = folder / split / "nshards.txt"
    number = int(expected.read_text()) if expected.is_file() else len(shards)
    shards = sorted(shards, key=lambda path: (len(path.stem), path.stem))
    data = TaskData(task, str(folder), shards=shards, missing_shards=number - len(shards))
    if task.kind == "classification":
        data.classes = _lines(folder / "classnames.txt")
        data.templates = _lines(folder / "zeroshot_classification_templates.txt")
    return data


def _on_hub(task: Task, split: str) -> TaskData:
    """Data of the first repository that can be read; its shards are fetched one after the other, as they are needed."""
    for repository in task.repositories:
        try:
            names = _from_hub(list_repo_files, repository)
        except UserError as error:
            trouble = error
            continue
        texts = [name for name in names if name.endswith(".txt") or name.endswith(".parquet")]
        folder = Path(_from_hub(snapshot_download, repository, allow_patterns=texts))
        if parquet := [str(folder / name) for name in names if name.endswith(".parquet")]:
            return TaskData(task, repository, rows=datasets.load_dataset("parquet", data_files=parquet, split="train"))
        shards = [Path(name) for name in names if name.startswith(f"{split}/") and name.endswith(".tar")]
        data = _from_shards(task, folder, split, shards)
        data.repository = repository
        return data
    raise trouble


def _from_hub(call, repository: str, **options):
    try:
        return call(repository, repo_type="dataset", **options)
    except Exception as error:  # the client raises many kinds
        raise UserError(f"{repository} cannot be read from the Hub: {str(error).strip().splitlines()[0]}") from None


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: content}) of each sample of a WebDataset tar; raises `UserError` when it is cut off."""
    key, members = None, {}
    with path.open("rb") as file:
        # A tar ends in zeros. One that is cut off would otherwise pass for a shorter one.
        if file.seek(0, 2) < 512 or not (file.seek(-512, 2) and not any(file.read())):
            raise UserError(f"{path} is cut off (it has no end-of-archive mark); get it anew with --download.")
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if f"{folder}/{stem}" != key and members:
                    yield key, members
                    members = {}
                key = f"{folder}/{stem}"
                members[extension.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); get it anew with --download.") from None
    if members:
        yield key, members


def _through_datasets(task: Task, data_dir: Path, split: str) -> TaskData:
    path = data_dir / task.data
    if path.suffix == ".parquet":
        if not path.is_file():
            raise UserError(f"{path} does not exist: the task's data is missing; name its folder with --data_dir.")
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    else:
        try:
            rows = datasets.load_dataset(str(path) if path.exists() else task.data, split=split)
        except Exception as error:  # `datasets` raises many kinds
            raise UserError(f"{task.name}: {task.data} cannot be loaded: {str(error).splitlines()[0]}") from None
    needed = (task.image_column, "caption" if task.kind == "retrieval" else task.label_column)
    if missing := [c for c in needed if c not in rows.column_names]:
        raise UserError(f"{task.name}: there is no column {missing[0]}; there are {', '.join(rows.column_names)}.")
    data = TaskData(task, task.data, rows=rows)
    if task.kind == "retrieval":
        return data
    if task.texts:
        file = data_dir / task.texts
        if not file.is_file():
            raise UserError(f"{file} does not exist: the class names are missing; name their folder with --data_dir.")
        texts = json.loads(file.read_text(encoding="utf-8"))
        data.classes, data.templates = texts["classes"], texts["templates"]
    else:
        data.classes = [re.sub("[_-]", " ", name) for name in rows.features[task.label_column].names]
        data.templates = ["a photo of a {}."]
    return data


def _sample_of_row(row: dict, task: Task) -> Sample:
    if task.kind == "winogavil":
        chosen = [row["candidates"].index(name) for name in row["associations"]]
        return Sample(list(row["candidates_images"]), cue=row["cue"], associations=chosen)
    if task.kind == "retrieval":
        captions = row["caption"]
        return Sample([row[task.image_column]], captions=[captions] if isinstance(captions, str) else list(captions))
    return Sample([row[task.image_column]], label=row[task.label_column])


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file} is missing; get it with --download.")
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line]
