"""Measure images per second of the training pipeline by kind of source, and against the loaders of other projects.

    python training/benchmarks/data.py --output training/benchmarks/data.json

Photographs of 512 x 512 pixels (cut from two of scikit-learn's and rotated) become training images of 224 pixels.
`plain` opens, converts, resizes, crops and makes a float tensor of the whole image. `ours` calls `open_image` of
modeling_amorlip/images_amorlip.py and `augment` of training/data/transforms.py: they use the reduced resolutions that
the JPEG decoder offers, resample once and stay in uint8. These run in one process without workers. The loaders of
training/benchmarks/data_loaders.py run with workers over the same tars. All are timed in turns; reported are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from modeling_amorlip.images_amorlip import open_image
from training.benchmarks.data_loaders import BATCH_SIZE, SIZE, MakeBatches, make_loaders
from training.benchmarks.timing import time_in_turns
from training.config import AugmentationConfig, PretrainConfig
from training.data.dataset import PairDataset, image_to_tensor
from training.data.mixture import open_pairs
from training.data.transforms import augment


MAX_IMAGE_PIXELS = 10**8


def photographs(number: int) -> list[bytes]:
    """Return JPEG files of 512 x 512 pixels."""
    generator = random.Random(0)
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    files = []
    for i in range(number):
        photo, side = photos[i % len(photos)], generator.randint(300, 420)
        left, top = (generator.randint(0, length - side) for length in photo.size)
        buffer = io.BytesIO()
        crop = photo.crop((left, top, left + side, top + side)).resize((512, 512), Image.Resampling.BICUBIC)
        crop.rotate(90 * generator.randint(0, 3)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def plain(file: bytes) -> torch.Tensor:
    """Return a training image as commonly written, float [3, 224, 224]."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    image = image.resize((256, 256), Image.Resampling.BICUBIC)
    edge = (256 - SIZE) // 2
    image = image.crop((edge, edge, edge + SIZE, edge + SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def ours(file: bytes, augmentation: AugmentationConfig) -> torch.Tensor:
    """Return a training image as training makes it, uint8 [3, 224, 224]."""
    return image_to_tensor(augment(open_image(file, MAX_IMAGE_PIXELS), SIZE, augmentation, random.Random(0)))


def write_sources(files: list[bytes], folder: Path) -> dict[str, Path]:
    """Write the same pairs as a tar, a parquet file and an image folder; return their paths by kind."""
    write_tar(files, folder / "pairs.tar")
    rows = [{"image": {"bytes": file}, "caption": f"photograph {i}"} for i, file in enumerate(files)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pairs.parquet")
    images = folder / "images/train"
    images.mkdir(parents=True)
    for i, file in enumerate(files):
        (images / f"{i:06d}.jpg").write_bytes(file)
    names = "".join(f"{i:06d}.jpg,photograph {i}\n" for i in range(len(files)))
    (images / "metadata.csv").write_text("file_name,caption\n" + names)
    return {"webdataset": folder / "pairs.tar", "parquet": folder / "pairs.parquet", "folder": folder / "images"}


def write_tar(files: list[bytes], path: Path) -> None:
    """Write pairs as a tar."""
    with tarfile.open(path, "w") as tar:
        for i, file in enumerate(files):
            for suffix, content in ((".jpg", file), (".txt", f"photograph {i}".encode())):
                member = tarfile.TarInfo(f"{i:06d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def load_all(dataset: PairDataset) -> list[Any]:
    """Return all samples of the first epoch."""
    return [dataset[0, i] for i in range(len(dataset))]


def make_calls(files: list[bytes], folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the pipelines by name, each a call that makes all training images once."""
    augmentation = PretrainConfig(output_dir="none", train_data="none").augmentation
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: [plain(file) for file in files],
        "ours": lambda: [ours(file, augmentation) for file in files],
    }
    for kind, path in write_sources(files, folder).items():
        config = PretrainConfig(output_dir="none", train_data=str(path))
        dataset = PairDataset(open_pairs(config), config, SIZE)
        calls[f"ours, {kind}"] = functools.partial(load_all, dataset)
    return calls


def write_tars(files: list[bytes], folder: Path, number: int) -> list[Path]:
    """Write pairs evenly to a number of tars, and return their paths."""
    paths = [folder / f"{shard:05d}.tar" for shard in range(number)]
    for shard, path in enumerate(paths):
        write_tar(files[shard::number], path)
    return paths


def time_pipelines(files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    """Return images per second of the pipelines without workers, relative to the plain one."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_in_turns(make_calls(files, Path(folder)), rounds)
    return summarize(seconds, len(files), "plain")


def time_loaders(files: list[bytes], rounds: int, num_workers: int) -> list[dict[str, Any]]:
    """Return images per second of the loaders over an epoch, the start of workers included, relative to open_clip's."""
    number = len(files) // (BATCH_SIZE * num_workers) * BATCH_SIZE * num_workers
    with tempfile.TemporaryDirectory() as folder:
        tars = write_tars(files[:number], Path(folder), 4 * num_workers)
        loaders = make_loaders(tars, number, num_workers)
        counts = {name: sum(len(next(iter(_tensors(batch)))) for batch in make()) for name, make in loaders.items()}
        calls = {name: functools.partial(_exhaust, make) for name, make in loaders.items()}
        seconds = time_in_turns(calls, rounds)
    assert len(set(counts.values())) == 1, f"the loaders give other numbers of images: {counts}"
    results = summarize(seconds, counts["this project"], "open_clip" if "open_clip" in calls else "this project")
    return [{**result, "num_workers": num_workers} for result in results]


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [value for value in (batch.values() if isinstance(batch, dict) else batch) if torch.is_tensor(value)]


def _exhaust(make_batches: MakeBatches) -> None:
    for _ in make_batches():
        pass


def summarize(seconds: dict[str, list[float]], num_images: int, reference: str) -> list[dict[str, Any]]:
    """Return the median rate of each pipeline, and the median of its ratio to a reference in the same round."""
    results = []
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[reference], values, strict=True))
        rate = num_images / statistics.median(values)
        results.append({"name": name, "images_per_second": rate, "ratio": ratio})
        print(f"{name:<18} {rate:9.1f} {ratio:7.2f} x {reference}")
    return results


def main() -> int:
    """Time all pipelines, print a table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="images without workers (default: 200)")
    parser.add_argument("--loader_images", type=int, default=1024, help="images of the loaders (default: 1024)")
    parser.add_argument("--num_workers", type=int, default=1, help="worker processes of the loaders (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of all pipelines (default: 7)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = time_pipelines(photographs(arguments.images), arguments.rounds)
    loaders = time_loaders(photographs(arguments.loader_images), arguments.rounds, arguments.num_workers)
    if arguments.output:
        report = {
            "command": " ".join(sys.argv),
            "versions": find_versions(),
            "images": arguments.images,
            "results": results,
            "loader_images": arguments.loader_images,
            "loaders": loaders,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that matter for speed, as far as they are installed."""
    packages = ("torch", "torchvision", "pillow", "datasets", "tokenizers", "open_clip_torch", "webdataset")
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


if __name__ == "__main__":
    sys.exit(main())
