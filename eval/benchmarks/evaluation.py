"""Wall time of the evaluation's embedding loop against the model's own time on the same images.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 eval/benchmarks/evaluation.py \
        --model outputs/emoji_demo --output eval/benchmarks/evaluation.json

The loop decodes PNGs, makes them ready and encodes them; the model's own time is that of encoding what is ready, in the
same memory layout. Each process takes its share of the images, all begin together, and the slowest counts. Rounds of
both take turns; medians and their ratio are reported.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from eval.models import load_model
from eval.runner import ProcessShard
from modeling_amorlip.embedder_amorlip import encode_images
from modeling_amorlip.images_amorlip import preprocess_images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--data", default="demo_data/emoji/openmoji.parquet", help="parquet of images, repeated")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    state = PartialState(cpu=True)
    share = ProcessShard(state.process_index, state.num_processes)
    model, processor = load_model(arguments.model)
    rows = datasets.load_dataset("parquet", data_files=arguments.data, split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    files = itertools.islice(itertools.cycle([row["image"]["bytes"] for row in rows]), arguments.images)
    files = list(share.take(files))
    some = [Image.open(io.BytesIO(file)) for file in files[: arguments.batch_size]]
    ready = preprocess_images(processor.image_processor, some)

    def loop() -> None:
        encode_images(model, processor, (Image.open(io.BytesIO(file)) for file in files), arguments.batch_size)

    def model_alone() -> None:
        with torch.inference_mode():
            for start in range(0, len(files), arguments.batch_size):
                model.get_image_features(pixel_values=ready[: len(files) - start])

    seconds: dict = {loop: [], model_alone: []}
    for _, call in itertools.product(range(arguments.rounds), seconds):
        state.wait_for_everyone()
        start = time.perf_counter()
        call()
        seconds[call].append(max(gather_object([time.perf_counter() - start])))
    if not state.is_main_process:
        return 0
    wall, own = (statistics.median(values) for values in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    number = f"{arguments.images} images, {state.num_processes} processes"
    print(f"{number}: loop {wall:.2f} s, model alone {own:.2f} s, ratio {ratio:.2f}")
    if arguments.output:
        report = {"command": " ".join(sys.argv), "processes": state.num_processes, "loop": wall, "model": own}
        arguments.output.write_text(json.dumps({**report, "ratio": ratio}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
