"""Wall time of zero-shot classification by this project and by CLIP_benchmark: same weights, same WebDataset task.

    python eval/benchmarks/peers.py --images 10000 --rounds 1 --output eval/benchmarks/peers.json

It needs an environment that has open_clip and CLIP_benchmark (docs/speed.md). Random ViT-B/32 weights are saved once;
JPEGs are written once, in shards. Classes are the first of ImageNet's, each with OpenAI's 80 prompts; ImageNet-A and
ImageNet-R have 200 of them. Each round runs both command lines, one after the other, in a process of its own with two
threads; the order alternates. The median of the rounds' ratios is reported, with the accuracies of both.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE, SHARD_SIZE = "ViT-B-32", 1000
DISTINCT = 256  # images; reading and decoding cost the same when they come again
PACKAGES = ("torch", "torchvision", "open_clip_torch", "clip-benchmark", "transformers")


def write_task(folder: Path, images: int, pixels: int, classes: int) -> None:
    """Write a WebDataset task of JPEGs with noise of several scales, which compress like photographs."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    generator = np.random.default_rng(0)
    files = [_draw_jpeg(generator, pixels) for _ in range(min(images, DISTINCT))]
    (folder / "test").mkdir(parents=True)
    for shard in range(-(-images // SHARD_SIZE)):
        with tarfile.open(folder / f"test/{shard}.tar", "w") as tar:
            for index in range(shard * SHARD_SIZE, min(images, (shard + 1) * SHARD_SIZE)):
                _add(tar, f"{index:06d}.jpg", files[index % DISTINCT])
                _add(tar, f"{index:06d}.cls", str(index % classes).encode())
    (folder / "test/nshards.txt").write_text(str(-(-images // SHARD_SIZE)))
    (folder / "classnames.txt").write_text("\n".join(IMAGENET_CLASSNAMES[:classes]))
    templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))


def _draw_jpeg(generator: np.random.Generator, pixels: int) -> bytes:
    size = (pixels, pixels)
    canvas = np.zeros((pixels, pixels, 3), np.float32)
    for cells in (4, 16, 64, 250):
        layer = generator.integers(0, 256, (cells, cells, 3), np.uint8)
        canvas += np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC), np.float32) / 4
    buffer = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_models(folder: Path, tokenizer: str | None) -> None:
    """Save random weights as open_clip's checkpoint and as an AmorLIP folder converted from it."""
    import open_clip
    import torch

    from modeling_amorlip.convert_clip_to_amorlip import convert, save

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(ARCHITECTURE).state_dict(), folder / "weights.pt")
    # open_clip has the tokenizer inside; its vocabulary gives Transformers the same one.
    save(convert(folder / "weights.pt", tokenizer=tokenizer or _write_tokenizer(folder / "tokenizer")), folder / "ours")


def _write_tokenizer(folder: Path) -> Path:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    vocab = dict(simple.encoder)
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = simple.sot_token_id, simple.eot_token_id
    vocab = {token: number for token, number in vocab.items() if token not in ("<start_of_text>", "<end_of_text>")}
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    return folder


def run_ours(work: Path, workers: int) -> tuple[float, float]:
    """Return (seconds, accuracy) of eval/run.py."""
    output = work / "ours.json"
    output.unlink(missing_ok=True)
    command = ["eval/run.py", "--model", work / "models/ours", "--tasks", work / "task.yaml", "--data_dir", work]
    command += ["--output", output, "--bootstrap", 0, "--num_workers", workers]
    seconds = _run(command)
    scores = json.loads(output.read_text())["tasks"]["benchmark"]["scores"]
    return seconds, scores["cosine"]["acc1"]["value"]


def run_clip_benchmark(work: Path, workers: int) -> tuple[float, float]:
    """Return (seconds, accuracy) of `clip_benchmark eval`."""
    output = work / "theirs.json"
    output.unlink(missing_ok=True)
    command = ["-m", "clip_benchmark.cli", "eval", "--model", ARCHITECTURE, "--pretrained", work / "models/weights.pt"]
    command += ["--dataset", "wds/benchmark", "--dataset_root", work / "wds_benchmark", "--batch_size", 64]
    command += ["--no_amp", "--num_workers", workers, "--output", output]
    seconds = _run(command)
    return seconds, json.loads(output.read_text())["metrics"]["acc1"]


def _run(command: list) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-3000:]}")
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("outputs/clip_benchmark"), help="Folder for task and weights.")
    add("--images", type=int, default=10_000, help="Number of JPEGs (default: %(default)s).")
    add("--pixels", type=int, default=500, help="Height and width of the JPEGs (default: %(default)s).")
    add("--classes", type=int, default=200, help="Number of ImageNet's classes (default: %(default)s).")
    add("--rounds", type=int, default=3, help="Rounds of each of the two (default: %(default)s).")
    add("--num_workers", type=int, default=1, help="Processes that read images, for both (default: %(default)s).")
    add("--tokenizer", help="Folder of CLIP's tokenizer (default: made of open_clip's vocabulary).")
    add("--output", type=Path, help="JSON file to write.")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve() / f"{arguments.images}_{arguments.classes}"
    if not (work / "wds_benchmark/test/nshards.txt").is_file():
        write_task(work / "wds_benchmark", arguments.images, arguments.pixels, arguments.classes)
    (work / "task.yaml").write_text("benchmark: {repositories: [x/wds_benchmark]}\n")
    if not (work / "models/ours/config.json").is_file():
        write_models(work / "models", arguments.tokenizer)
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "clip_benchmark": []}
    both = [("ours", run_ours), ("clip_benchmark", run_clip_benchmark)]
    for number in range(arguments.rounds):
        for name, run in both if number % 2 == 0 else both[::-1]:
            runs[name].append(run(work, arguments.num_workers))
            print(f"{name}: {runs[name][-1][0]:.1f} s, top-1 {100 * runs[name][-1][1]:.2f} %", flush=True)
    seconds = {name: [run[0] for run in values] for name, values in runs.items()}
    accuracies = {name: values[0][1] for name, values in runs.items()}
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"{arguments.images} images: {ratio:.2f} of CLIP_benchmark's wall time; top-1 {accuracies}")
    if arguments.output:
        report = {name: getattr(arguments, name) for name in ("images", "pixels", "classes", "num_workers")}
        report |= {"seconds": seconds, "acc1": accuracies, "ratio": ratio}
        report |= {"versions": {name: version(name) for name in PACKAGES}}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
