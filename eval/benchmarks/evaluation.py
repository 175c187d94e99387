"""Wall time of the evaluation's embedding loop against the model's own time on the same images.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 eval/benchmarks/evaluation.py \
        --model outputs/emoji_demo --output eval/benchmarks/evaluation.json

The loop decodes PNGs, preprocesses and encodes them; the model's own time is that of encoding preprocessed pixels in
the same memory layout. Each process takes its part of the images, all start together, and the slowest one counts.
Rounds of both alternate; medians and their ratio are reported.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from eval.models import load_model
from eval.sharding import ProcessShard
from modeling_amorlip.embedder_amorlip import encode_images
from modeling_amorlip.images_amorlip import preprocess_images


def measure(model: Any, processor: Any, files: list[bytes], batch_size: int, rounds: int) -> tuple[list, list]:
    """Return the seconds of each round, of the loop and of the model alone; the slowest process counts."""
    first: list[Image.Image] = [Image.open(io.BytesIO(file)) for file in files[:batch_size]]
    pixel_values = preprocess_images(processor.image_processor, first)

    def run_loop() -> None:
        encode_images(model, processor, (Image.open(io.BytesIO(file)) for file in files), batch_size)

    @torch.inference_mode()
    def run_model() -> None:
        for start in range(0, len(files), batch_size):
            model.get_image_features(pixel_values=pixel_values[: len(files) - start])

    loop_seconds, model_seconds = [], []
    for _ in range(rounds):
        loop_seconds.append(_time(run_loop))
        model_seconds.append(_time(run_model))
    return loop_seconds, model_seconds


def _time(call: Callable[[], None]) -> float:
    PartialState().wait_for_everyone()
    start = time.perf_counter()
    call()
    return max(gather_object([time.perf_counter() - start]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Folder or Hub repository of the model.")
    add("--data", default="demo_data/emoji/openmoji.parquet", help="Parquet file of images, which are repeated.")
    add("--images", type=int, default=10_000, help="Number of images (default: %(default)s).")
    add("--batch_size", type=int, default=256, help="Images encoded at a time (default: %(default)s).")
    add("--rounds", type=int, default=5, help="Rounds of each of the two (default: %(default)s).")
    add("--output", type=Path, help="JSON file to write.")
    arguments = parser.parse_args()
    state = PartialState(cpu=True)
    shard = ProcessShard(state.process_index, state.num_processes)
    model, processor = load_model(arguments.model)
    rows = datasets.load_dataset("parquet", data_files=arguments.data, split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    files = itertools.islice(itertools.cycle([row["image"]["bytes"] for row in rows]), arguments.images)
    seconds = measure(model, processor, list(shard.take(files)), arguments.batch_size, arguments.rounds)
    if not state.is_main_process:
        return 0
    loop, alone = map(statistics.median, seconds)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    number = f"{arguments.images} images, {state.num_processes} processes"
    print(f"{number}: loop {loop:.2f} s, model alone {alone:.2f} s, ratio {ratio:.2f}")
    if arguments.output:
        report = {"command": " ".join(sys.argv), "processes": state.num_processes, "loop": loop, "model": alone}
        arguments.output.write_text(json.dumps({**report, "ratio": ratio}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
