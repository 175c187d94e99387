"""Measure memory and waiting times of runs over a billion pairs, in 10,000 shards of 100,000.

    python training/benchmarks/billion_pairs.py --output training/benchmarks/billion_pairs.json

The shards are links to one small tar, and their indices links to one index of 100,000 pairs, which all lie at the
same place of the tar: what a process reads and holds per shard and per pair is what a real data set takes, while the
data set needs no disk. Images are small, so that times are not those of decoding. Peak memory is that of the larger of
the training process and its data worker, in a run of a tiny model, with a billion pairs and with one shard of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, cast


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from PIL import Image

from training.benchmarks.data import photographs, write_tar
from training.config import PretrainConfig
from training.data.dataset import make_dataloader
from training.data.index_cache import index_name
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.data.shards import LocalShards
from training.data.tar_index import ShardIndex, Summary, scan_shard, write_index
from training.model.tokenizer import train_tokenizer
from training.validation import held_out


SHUFFLES: tuple[Literal["samples", "shards"], ...] = ("samples", "shards")
ROOT = Path(__file__).resolve().parents[2]
PAIRS_PER_SHARD = 100_000
BATCH_SIZE = 128
HELD_OUT = 10_000
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
RECIPE: dict[str, Any] = {
    "per_device_train_batch_size": BATCH_SIZE,
    "validation_samples": HELD_OUT,
    "dataloader_num_workers": 1,
    "max_steps": 10,
    "projection_dim": 32,
    "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **ENCODER},
    "text_config": {"model_type": "clip_text_model", "max_position_embeddings": 32, **ENCODER},
}


def write_shards(folder: Path, num_shards: int) -> None:
    """Write a tar of one pair and an index that says it has many, and link both to all shards."""
    (folder / "shards").mkdir()
    cache = folder / "home" / "amorlip"
    cache.mkdir(parents=True)
    tar = folder / "shards" / "00000.tar"
    picture = io.BytesIO()
    Image.open(io.BytesIO(photographs(1)[0])).resize((64, 64)).save(picture, "JPEG")
    write_tar([picture.getvalue()], tar)
    shards = LocalShards([str(tar)])
    small = scan_shard(shards.open(0)).body
    places, key = small[:24], b"%09d"
    keys = b"".join(key % i for i in range(PAIRS_PER_SHARD))
    ends = b"".join((9 * i).to_bytes(4, "little") for i in range(1, PAIRS_PER_SHARD + 1))
    body = places * PAIRS_PER_SHARD + ends + keys
    index = ShardIndex(Summary(num_pairs=PAIRS_PER_SHARD, body_size=len(body)), body)
    first = cache / index_name(shards.identity(0))
    write_index(first, index)
    for i in range(1, num_shards):
        link = tar.with_name(f"{i:05d}.tar")
        os.link(tar, link)
        os.link(first, cache / index_name(LocalShards([str(link)]).identity(0)))
    train_tokenizer(["photograph 0"], 520).save_pretrained(folder / "tokenizer")


def measure_peak(folder: Path, train_data: Path, shuffle: str) -> float:
    """Return the peak memory of a short run in MB."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = {"tokenizer": str(folder / "tokenizer"), "output_dir": f"{output}/run", "shuffle": shuffle}
        recipe = Path(output) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, "train_data": str(train_data), **settings}))
        command = [sys.executable, str(ROOT / "training/pretrain.py"), "--config", str(recipe)]
        process = subprocess.Popen(command, env=_environment(folder), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        return usage.ru_maxrss / 1024


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def measure_times(folder: Path, shuffle: Literal["samples", "shards"]) -> dict[str, float]:
    """Return the seconds until the pairs are open, and until batches come at a start, an epoch's end and a resume."""
    settings: dict[str, Any] = {"per_device_train_batch_size": BATCH_SIZE, "dataloader_num_workers": 0}
    config = PretrainConfig(output_dir="none", train_data=str(folder / "shards"), shuffle=shuffle, **settings)
    seconds = {}
    start = time.perf_counter()
    pairs = open_pairs(config)
    seconds["open"] = time.perf_counter() - start

    def first_batches(start_step: int, number: int) -> float:
        start = time.perf_counter()
        order = EpochOrder(pairs, config, held_out(len(pairs), HELD_OUT))
        sampler = PairSampler(order, len(order), BATCH_SIZE, 8, 3, start_step=start_step)
        batches = iter(make_dataloader(pairs, config, 32, cast(Any, list), sampler))
        for _ in range(number - 1):
            next(batches)
        if number > 1:
            start = time.perf_counter()
        next(batches)
        return time.perf_counter() - start

    steps = (len(pairs) - HELD_OUT) // (BATCH_SIZE * 8)
    seconds["first_batch"] = first_batches(0, 1)
    seconds["next_batch"] = first_batches(0, 2)
    seconds["first_batch_of_an_epoch"] = first_batches(steps - 1, 2)
    seconds["first_batch_of_a_resume"] = first_batches(random.Random(0).randrange(steps), 1)
    return seconds


def main() -> int:
    """Measure both orders, print the figures and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000, help="shards of 100,000 pairs (default: 10000)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        samples, shards = (measure_times(arguments.measure, shuffle) for shuffle in SHUFFLES)
        print(json.dumps({"samples": samples, "shards": shards}))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, arguments.shards)
        command = [sys.executable, __file__, "--measure", name]
        times = json.loads(subprocess.run(command, env=_environment(folder), capture_output=True, check=True).stdout)
        report: dict[str, Any] = {"command": " ".join(sys.argv), "pairs": arguments.shards * PAIRS_PER_SHARD}
        for shuffle, seconds in times.items():
            one = measure_peak(folder, folder / "shards" / "00000.tar", shuffle)
            peak = measure_peak(folder, folder / "shards", shuffle)
            report[shuffle] = {"seconds": seconds, "peak_mb": peak, "peak_mb_of_one_shard": one}
            print(f"{shuffle}: {seconds}, {peak - one:.0f} MB more than one shard's {one:.0f} MB")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
