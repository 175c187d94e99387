"""A task's samples, from the public layouts (WebDataset tars, parquet) or through `datasets`.

A folder in the WebDataset layout holds `test/0.tar ...`, `test/nshards.txt`, `classnames.txt` and
`zeroshot_classification_templates.txt`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from eval.samples import Sample, sample_of_members, sample_of_row
from eval.tables import (
    check_classes,
    check_templates,
    label_values,
    load_parquet,
    number_classes,
    read_text,
    select_split,
)
from eval.tars import read_tar
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError


HUB = Path("hub")
"""The `data_dir` that stands for repositories on the Hub."""
SHARD_SIZE = 2**32  # above any shard's number of samples


@dataclass
class TaskData:
    """Where a task's data lies. A sample's position is its shard's number times `SHARD_SIZE` plus its index there."""

    task: Task
    path: str
    classes: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    hub_name: str | None = None  # the data set on the Hub that this is a copy of
    repository: str | None = None  # on the Hub, from which shards are fetched when it is their turn
    revision: str | None = None  # of the repository, or the fingerprint of `datasets`
    files: list[Path] = field(default_factory=list)  # parquet files behind `rows`
    rows: datasets.Dataset | None = None
    labels: dict[Any, int] | None = None  # class numbers of labels that are not class numbers themselves
    missing_shards: int = 0

    def samples(self) -> Iterator[Sample]:
        """Yield all samples in order."""
        return (sample for batch in self.batches(64) for _, sample in batch)

    def batches(self, batch_size: int, reader: int = 0, readers: int = 1) -> Iterator[list[tuple[int, Sample]]]:
        """Yield the batches of (position, sample) that are one reader's part.

        Batches never cross shards and hold the same samples whatever the number of readers, so that results do not
        depend on it. A reader reads whole shards where there are as many shards as readers.
        """
        if self.rows is not None:
            for start in range(reader * batch_size, len(self.rows), readers * batch_size):
                stop = min(start + batch_size, len(self.rows))
                yield [(row, self._sample_of_row(row)) for row in range(start, stop)]
            return
        stripes = -(-readers // max(1, len(self.shards)))
        units = [(shard, stripe) for shard in range(len(self.shards)) for stripe in range(stripes)]
        for shard, stripe in units[reader::readers]:
            yield from self._tar_batches(shard, batch_size, stripe, stripes)

    def _tar_batches(
        self, shard: int, batch_size: int, stripe: int, stripes: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """Yield every `stripes`-th batch of a shard, starting at batch `stripe`."""
        batch: list[tuple[int, Sample]] = []
        path = self._local_shard(shard)
        for index, key, members in read_tar(path, lambda index: index // batch_size % stripes == stripe):
            batch.append((shard * SHARD_SIZE + index, sample_of_members(f"{path.name}: {key}", members)))
            if (index + 1) % batch_size == 0:
                yield batch
                batch = []
        if batch:
            yield batch

    def read(self, positions: list[int]) -> list[Sample]:
        """Return the samples at some positions, in that order."""
        if self.rows is not None:
            return [self._sample_of_row(position) for position in positions]
        samples: dict[int, Sample] = {}
        for shard in sorted({position // SHARD_SIZE for position in positions}):
            indices = {position % SHARD_SIZE for position in positions if position // SHARD_SIZE == shard}
            path = self._local_shard(shard)
            for index, key, members in read_tar(path, indices.__contains__):
                samples[shard * SHARD_SIZE + index] = sample_of_members(f"{path.name}: {key}", members)
        return [samples[position] for position in positions]

    def align_labels(self, reference: TaskData) -> None:
        """Number labels that are no class numbers as another split does; labels that it lacks come after its own."""
        if self.labels is None or reference.labels is None:
            return
        unseen = [value for value in self.labels if value not in reference.labels]
        self.labels = {**reference.labels, **{value: len(reference.labels) + n for n, value in enumerate(unseen)}}
        self.classes = reference.classes + [str(value) for value in unseen]

    def fingerprint(self) -> str:
        """Return a short hash that changes when class names, templates or data do.

        Local files count by name, size and time of change, data on the Hub by its commit.
        """
        local = [] if self.repository else [*self.files, *self.shards]
        stamps = [(path.name, stat.st_size, stat.st_mtime_ns) for path in local for stat in [path.stat()]]
        content = [self.classes, self.templates, self.repository, self.revision, stamps]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _local_shard(self, shard: int) -> Path:
        path = self.shards[shard]
        if not self.repository:
            return path
        name = path.as_posix()
        return Path(_from_hub(hf_hub_download, self.repository, filename=name, revision=self.revision))

    def _sample_of_row(self, index: int) -> Sample:
        assert self.rows is not None
        (row,) = self.rows[[index]].to_pylist()
        return sample_of_row(self.task, f"row {index}", row, self.labels)


def find_data(task: Task, data_dir: Path, split: str | None = None) -> TaskData:
    """Return a task's data below `data_dir`, or on the Hub if `data_dir` is `HUB`.

    Args:
        split: Split to read; defaults to the one that the task is evaluated on.

    Raises:
        UserError: There is no such data or split, or its class names or templates are missing or wrong.
    """
    split = split or task.split
    if task.data:
        return _through_datasets(task, data_dir.expanduser(), split)
    if data_dir == HUB:
        return _on_hub(task, split)
    names = [repository.split("/")[-1] for repository in task.repositories]
    data_dir = data_dir.expanduser()
    place = next((i for i, name in enumerate(names) if (data_dir / name).is_dir()), None)
    if place is None:
        raise UserError(
            f"{task.name}: there is no folder {' or '.join(names)} in {data_dir}; fetch it with --download {task.name}."
        )
    folder = data_dir / names[place]
    if parquet := sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")):
        files = [folder / name for name in select_split(parquet, split, task)]
        data = _from_table(task, data_dir, str(folder), load_parquet(map(str, files), task), files=files)
    else:
        data = _from_shards(task, folder, split, list((folder / split).glob("*.tar")))
    data.hub_name = task.repositories[place]
    return data


def _from_shards(task: Task, folder: Path, split: str, shards: list[Path]) -> TaskData:
    """Return data in the WebDataset layout, whose text files lie in `folder`."""
    if not shards:
        raise UserError(f"{task.name}: {folder} holds neither {split}/*.tar nor *.parquet.")
    shards = sorted(shards, key=lambda path: (len(path.stem), path.stem))
    expected = folder / split / "nshards.txt"
    data = TaskData(task, str(folder), shards=shards, missing_shards=_count_missing(expected, len(shards)))
    if task.kind == "classification":
        templates = folder / "zeroshot_classification_templates.txt"
        data.classes = check_classes(_lines(folder / "classnames.txt"), str(folder / "classnames.txt"))
        data.templates = check_templates([line for line in _lines(templates) if line], str(templates))
    return data


def _count_missing(file: Path, number: int) -> int:
    """Return how many shards of the number in nshards.txt there are not; raise `UserError` when there are more."""
    if not file.is_file():
        return 0
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() or int(text) < number:
        raise UserError(f"{file} says {text[:20]!r}, and there are {number} shards; write their number, or remove it.")
    return int(text) - number


def _on_hub(task: Task, split: str) -> TaskData:
    """Return the first repository that can be read; its shards are fetched one after the other, as they are needed."""
    trouble: UserError | None = None
    for repository in task.repositories:
        try:
            about = _from_hub(HfApi().repo_info, repository)
        except UserError as error:
            trouble = trouble or error
            continue
        names = [sibling.rfilename for sibling in about.siblings]
        parquet = sorted(name for name in names if name.endswith(".parquet"))
        chosen = select_split(parquet, split, task) if parquet else []
        texts = [name for name in names if name.endswith(".txt")]
        folder = Path(_from_hub(snapshot_download, repository, allow_patterns=texts + chosen, revision=about.sha))
        if chosen:
            rows = load_parquet([str(folder / name) for name in chosen], task)
            data = _from_table(task, folder, repository, rows)
        else:
            shards = [Path(name) for name in names if name.startswith(f"{split}/") and name.endswith(".tar")]
            data = _from_shards(task, folder, split, shards)
        data.hub_name = data.repository = repository
        data.revision = about.sha
        return data
    assert trouble is not None
    raise trouble


def _from_hub(call: Callable[..., Any], repository: str, **options: Any) -> Any:
    try:
        return call(repository, repo_type="dataset", **options)
    except Exception as error:  # the client raises many types
        raise UserError(f"{repository} cannot be read from the Hub: {str(error).strip().splitlines()[0]}") from None


def _through_datasets(task: Task, data_dir: Path, split: str) -> TaskData:
    path = data_dir / Path(str(task.data)).expanduser()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise UserError(f"{path} does not exist: the task's data is missing; name its folder with --data_dir.")
        if split != task.split:
            raise UserError(f"{task.name}: there is no {split} split, as {path} holds the {task.split} split alone.")
        return _from_table(task, data_dir, str(task.data), load_parquet([str(path)], task), files=[path])
    try:
        rows = datasets.load_dataset(str(path) if path.exists() else task.data, split=split)
    except Exception as error:  # `datasets` raises many types
        raise UserError(
            f"{task.name}: the {split} split of {task.data} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    data = _from_table(task, data_dir, str(task.data), rows)
    data.revision, data.hub_name = rows._fingerprint, None if path.exists() else task.data
    return data


def _from_table(
    task: Task, data_dir: Path, name: str, rows: datasets.Dataset, files: list[Path] | None = None
) -> TaskData:
    """Return data in rows, with its class names; raise `UserError` when a column is missing."""
    columns = {
        "winogavil": ("candidates", "candidates_images", "associations", "cue"),
        "retrieval": (task.image_column, "caption"),
        "classification": (task.image_column, task.label_column),
    }[task.kind]
    if missing := [column for column in columns if column not in rows.column_names]:
        raise UserError(f"{task.name}: there is no column {missing[0]}; there are {', '.join(rows.column_names)}.")
    # Raw values, so that one decoder reads all images.
    raw_rows = rows.select_columns(list(columns)).with_format("arrow")
    data = TaskData(task, name, rows=raw_rows, files=files or [])
    if task.kind != "classification":
        return data
    names, data.labels = label_values(rows, task)
    data.classes, data.templates = names, ["a photo of a {c}."]
    if task.texts:
        data.classes, data.templates = _read_texts(data_dir / Path(task.texts).expanduser())
        is_text = data.labels is not None and any(isinstance(value, str) for value in data.labels)
        data.labels = number_classes(data.classes, task.texts) if is_text else None
    return data


def _read_texts(file: Path) -> tuple[list[str], list[str]]:
    """Return (class names, templates) of a task's JSON file."""
    if not file.is_file():
        raise UserError(f"{file} does not exist: the class names are missing; name their folder with --data_dir.")
    try:
        texts = json.loads(read_text(file))
        classes, templates = texts["classes"], texts["templates"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} must be a JSON object with the lists classes and templates.") from None
    return check_classes(classes, f"{file}: classes"), check_templates(templates, str(file))


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file} is missing; fetch it with --download.")
    return read_text(file).replace("\r", "").rstrip("\n").split("\n")
