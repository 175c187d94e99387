"""Samples a second of a whole training step: ours, with texts trimmed and grouped by length, against who pads them.

    python training/benchmarks/peers.py --output training/benchmarks/peers_cpu.json
    python training/benchmarks/peers.py --batch_size 1024 --dtype bfloat16 --compile \\
        --output training/benchmarks/peers_gpu.json

CLIP's ViT-B/32, the same images and captions everywhere: forward, InfoNCE, backward, clipped norm, AdamW. Captions are
as long as CC12M's (20.2 ± 16.3 tokens, Changpinyo et al. 2021). Transformers' CLIPModel pads them to 77 as its run_clip
does; open_clip, where it is installed, as it always does. Variants take turns; medians, and ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from training.model.encoder import PairEncoder
from training.objectives.clip import CLIPObjective
from training.run.flops import FlopMeter


CONTEXT, START, END = 77, 49406, 49407


def make_batch(size: int, image_size: int, device: str) -> dict:
    """Random pixels, and texts whose lengths are distributed as CC12M's."""
    generator = np.random.default_rng(0)
    mean, deviation = 20.2, 16.3
    drawn = generator.gamma((mean / deviation) ** 2, deviation**2 / mean, size)
    lengths = np.clip(np.rint(drawn).astype(int) + 2, 3, CONTEXT).tolist()
    input_ids = torch.full((size, CONTEXT), END)
    for row, length in zip(input_ids, lengths, strict=True):
        row[0], row[1 : length - 1] = START, torch.from_numpy(generator.integers(1, 49000, length - 2))
    mask = (torch.arange(CONTEXT) < torch.tensor(lengths)[:, None]).long()
    pixels = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8)
    tensors = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"lengths": lengths}


def variants(batch: dict, arguments: argparse.Namespace) -> dict:
    """{name: () -> one training step}; all have the same architecture, each its own weights and optimiser."""
    device, steps = arguments.device, {}
    longest = max(batch["lengths"])
    trimmed = {**batch, **{name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}}
    pixels = batch["pixel_values"].float() / 255
    objective = CLIPObjective(None, None, "local")

    def step_of(parameters, loss):
        parameters = [p for p in parameters if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.2, fused=True)

        def step():
            with torch.autocast(device, arguments.dtype, enabled=arguments.dtype != torch.float32):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(groups: int, inputs: dict):
        model = AmorLIPModel(AmorLIPConfig(text_config=TEXT)).to(device).train()
        encoder = PairEncoder(model, [0.5] * 3, [0.5] * 3, text_groups=groups).to(device)
        if arguments.compile:
            encoder.compile()
        return step_of(encoder.parameters(), lambda: objective(*encoder(**inputs)).loss)

    steps["ours, grouped"] = ours(arguments.text_groups, trimmed)
    steps["ours, trimmed"] = ours(1, trimmed)
    steps["ours, padded"] = ours(1, batch)
    theirs = CLIPModel(CLIPConfig(text_config=TEXT)).to(device).train()
    if arguments.compile:
        theirs.compile()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "pixel_values": pixels}
    steps["transformers"] = step_of(theirs.parameters(), lambda: theirs(**inputs, return_loss=True).loss)
    try:
        import open_clip
    except ImportError:
        print("open_clip is not installed here, so it is left out")
        return steps
    peer, loss = open_clip.create_model("ViT-B-32").to(device).train(), open_clip.ClipLoss()
    if arguments.compile:
        peer.compile()
    steps["open_clip"] = step_of(peer.parameters(), lambda: loss(*peer(pixels, batch["input_ids"])))
    return steps


TEXT = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each variant, after one more")
    parser.add_argument("--text_groups", type=int, default=4)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile for all")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = make_batch(arguments.batch_size, 224, arguments.device)
    steps = variants(batch, arguments)
    meter = FlopMeter(AmorLIPModel(AmorLIPConfig(text_config=TEXT)).to(arguments.device), 224, CONTEXT)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if round:
                seconds[name].append(time.perf_counter() - start)
    results, tokens = [], sum(batch["lengths"])
    print(
        f"{tokens / arguments.batch_size:.1f} tokens a text\n{'variant':<16} {'samples/s':>9} {'ours is faster by':>18}"
    )
    for name, measured in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours, grouped"], measured, strict=True))
        rate = arguments.batch_size / statistics.median(measured)
        useful = meter.rates(arguments.batch_size, tokens, arguments.batch_size / rate)  # padding is no work
        results.append({"variant": name, "samples_per_second": rate, "grouped_is_faster_by": ratio, **useful})
        print(f"{name:<16} {rate:9.2f} {ratio:18.2f}")
    if arguments.output:
        about = {"command": " ".join(sys.argv), "device": arguments.device, "batch_size": arguments.batch_size}
        if arguments.device == "cuda":
            about |= {"gpu": torch.cuda.get_device_name(), "peak_memory": torch.cuda.max_memory_allocated()}
        arguments.output.write_text(json.dumps({**about, "results": results, "seconds": seconds}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
