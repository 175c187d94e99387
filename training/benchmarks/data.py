"""Images a second of the training pipeline by kind of source and by decoder, against what everybody writes first.

    python training/benchmarks/data.py --output training/benchmarks/data.json

Photographs of 512 x 512 pixels (two of scikit-learn, cut and turned) become training images of 224. `plain` opens,
converts, resizes, crops and makes a float tensor of the whole image; `ours` is `training.decoding`: the crop and the
nearest reduction that the JPEG decoder offers for nothing, one resampling, uint8. One process, in turns; medians.

Like the other benchmarks a script and no part of the `eval` package, which itself never looks at training.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from modeling_amorlip.images_amorlip import open_image
from training.config import PretrainConfig
from training.data.dataset import PairDataset
from training.data.mixture import open_pairs
from training.data.transforms import augment


SIZE = 224


def photographs(number: int) -> list[bytes]:
    generator = random.Random(0)
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    files = []
    for i in range(number):
        photo, side = photos[i % len(photos)], generator.randint(300, 420)
        left, top = (generator.randint(0, length - side) for length in photo.size)
        buffer = io.BytesIO()
        cut = photo.crop((left, top, left + side, top + side)).resize((512, 512), Image.Resampling.BICUBIC)
        cut.rotate(90 * generator.randint(0, 3)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def plain(file: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    image = image.resize((256, 256), Image.Resampling.BICUBIC)
    edge = (256 - SIZE) // 2
    image = image.crop((edge, edge, edge + SIZE, edge + SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_sources(files: list[bytes], folder: Path) -> dict[str, Path]:
    """The same pairs as tars, parquet and an image folder."""
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i, file in enumerate(files):
            for suffix, content in ((".jpg", file), (".txt", f"photograph {i}".encode())):
                member = tarfile.TarInfo(f"{i:06d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = photographs(arguments.images)
    settings = PretrainConfig(output_dir="none", train_data="none").augmentation

    def ours(file: bytes) -> torch.Tensor:
        image = augment(open_image(file, 10**8), SIZE, settings, random.Random(0))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    with tempfile.TemporaryDirectory() as folder:
        calls = {"plain": lambda: [plain(file) for file in files], "ours": lambda: [ours(file) for file in files]}
        for kind, path in write_sources(files, Path(folder)).items():
            values = PretrainConfig(output_dir="none", train_data=str(path))
            dataset = PairDataset(open_pairs(values), values, SIZE)
            calls[f"ours, {kind}"] = lambda dataset=dataset: [dataset[0, i] for i in range(len(files))]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    results = []
    print(f"{'pipeline':<18} {'images/s':>9} {'ratio':>7}")
    for name, measured in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], measured, strict=True))
        results.append({"name": name, "images_per_second": len(files) / statistics.median(measured), "ratio": ratio})
        print(f"{name:<18} {results[-1]['images_per_second']:9.1f} {ratio:7.2f}")
    if arguments.output:
        report = {"command": " ".join(sys.argv), "images": len(files), "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
