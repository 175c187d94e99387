"""Wall time of the evaluation's embedding loop against the model's own time on the same images.

    python eval/benchmarks/evaluation.py --model outputs/emoji_demo --output eval/benchmarks/evaluation.json

The loop decodes PNGs, makes them ready and encodes them; the model's own time is that of encoding what is ready.
Rounds of both take turns; medians and their ratio are reported.
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


sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # from a checkout, without installation

import datasets  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from eval.encode import encode_images, on_white  # noqa: E402
from eval.run import load_model  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--data", default="demo_data/emoji/openmoji.parquet", help="parquet of images, repeated")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(arguments.model)
    rows = datasets.load_dataset("parquet", data_files=arguments.data, split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    files = list(itertools.islice(itertools.cycle([row["image"]["bytes"] for row in rows]), arguments.images))
    some = [on_white(Image.open(io.BytesIO(file))) for file in files[: arguments.batch_size]]
    ready = processor.image_processor(some, return_tensors="pt")["pixel_values"]

    def loop() -> None:
        encode_images(model, processor, (Image.open(io.BytesIO(file)) for file in files), arguments.batch_size)

    def model_alone() -> None:
        with torch.inference_mode():
            for start in range(0, len(files), arguments.batch_size):
                model.get_image_features(pixel_values=ready[: len(files) - start])

    seconds: dict = {loop: [], model_alone: []}
    for _, call in itertools.product(range(arguments.rounds), seconds):
        start = time.perf_counter()
        call()
        seconds[call].append(time.perf_counter() - start)
    wall, own = (statistics.median(values) for values in seconds.values())
    print(f"{len(files)} images: loop {wall:.2f} s, model alone {own:.2f} s, ratio {wall / own:.2f}")
    if arguments.output:
        report = {"command": " ".join(sys.argv), "loop": wall, "model": own, "ratio": wall / own}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
