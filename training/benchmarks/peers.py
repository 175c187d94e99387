"""Measure samples per second of a whole training step, with trimmed and length-grouped texts, against other libraries.

    python training/benchmarks/peers.py --rounds 4 --output training/benchmarks/peers_cpu.json
    python training/benchmarks/peers.py --batch_size 1024 --dtype bfloat16 --compile --output outputs/peers_gpu.json

All variants are CLIP's ViT-B/32 on the same images and captions: forward, InfoNCE, backward, gradient clipping, AdamW.
Caption lengths follow CC12M's (20.2 ± 16.3 tokens, Changpinyo et al. 2021). Transformers' CLIPModel pads them to 77
tokens as its run_clip example does; open_clip, where it is installed, always pads. Variants run in turns; the report
holds medians, and ratios by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from training.benchmarks.timing import time_in_turns
from training.model.encoder import PairEncoder
from training.objectives.clip import CLIPObjective
from training.run.flops import FlopMeter


IMAGE_SIZE, CONTEXT, START, END = 224, 77, 49406, 49407
TEXT_CONFIG: dict[str, Any] = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
VISION_CONFIG: dict[str, Any] = {}  # the defaults are ViT-B/32
Step = Callable[[], None]


def make_batch(size: int, device: str) -> dict[str, Any]:
    """Return random pixels, and random texts whose lengths are distributed as CC12M's."""
    generator = np.random.default_rng(0)
    mean, deviation = 20.2, 16.3
    tokens = generator.gamma((mean / deviation) ** 2, deviation**2 / mean, size)
    lengths = np.clip(np.rint(tokens).astype(int) + 2, 3, CONTEXT).tolist()
    input_ids = torch.full((size, CONTEXT), END)
    for row, length in zip(input_ids, lengths, strict=True):
        row[0], row[1 : length - 1] = START, torch.from_numpy(generator.integers(1, 49000, length - 2))
    mask = (torch.arange(CONTEXT) < torch.tensor(lengths)[:, None]).long()
    pixels = torch.randint(0, 256, (size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    tensors = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"lengths": lengths}


@dataclass
class Variants:
    """Training steps of the same architecture, each with its own weights and optimizer."""

    batch: dict[str, Any]
    device: str
    dtype: torch.dtype
    compile: bool
    text_groups: int

    def steps(self) -> dict[str, Step]:
        """Return all variants by name, with open_clip's where it is installed."""
        longest = max(self.batch["lengths"])
        trimmed = {**self.batch, **{name: self.batch[name][:, :longest] for name in ("input_ids", "attention_mask")}}
        steps = {
            "ours, grouped": self._ours(self.text_groups, trimmed),
            "ours, trimmed": self._ours(1, trimmed),
            "ours, padded": self._ours(1, self.batch),
            "transformers": self._transformers(),
        }
        try:
            import open_clip
        except ImportError:
            print("open_clip is not installed and is left out")
            return steps
        return steps | {"open_clip": self._open_clip(open_clip)}

    def _step(self, parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Step:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.2, fused=True)

        def step() -> None:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return step

    def _ours(self, groups: int, inputs: dict[str, Any]) -> Step:
        config = AmorLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG)
        encoder = PairEncoder(AmorLIPModel(config), [0.5] * 3, [0.5] * 3, text_groups=groups).to(self.device).train()
        objective = CLIPObjective(config, CLIPObjective.Arguments(), "local")
        if self.compile:
            encoder.compile()
        return self._step(encoder.parameters(), lambda: objective(*encoder(**inputs)).loss)

    def _transformers(self) -> Step:
        model: nn.Module = CLIPModel(CLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG))
        model.to(self.device).train()
        if self.compile:
            model.compile()
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        inputs["pixel_values"] = self.batch["pixel_values"].float() / 255
        return self._step(model.parameters(), lambda: model(**inputs, return_loss=True).loss)

    def _open_clip(self, open_clip: Any) -> Step:
        model, loss = open_clip.create_model("ViT-B-32").to(self.device).train(), open_clip.ClipLoss()
        if self.compile:
            model.compile()
        pixels = self.batch["pixel_values"].float() / 255
        return self._step(model.parameters(), lambda: loss(*model(pixels, self.batch["input_ids"])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per step (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per variant, after a warm-up (default: 7)")
    parser.add_argument("--text_groups", type=int, default=4, help="groups of texts by length (default: 4)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of autocast (default: float32)"
    )
    parser.add_argument("--compile", action="store_true", help="compile every variant with torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def summarize(seconds: dict[str, list[float]], batch: dict[str, Any], meter: FlopMeter) -> list[dict[str, Any]]:
    """Return a row per variant, and print them."""
    batch_size, tokens, results = len(batch["lengths"]), sum(batch["lengths"]), []
    print(f"{tokens / batch_size:.1f} tokens per text")
    print(f"{'variant':<16} {'samples/s':>9} {'ours is faster by':>18}")
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours, grouped"], values, strict=True))
        rate = batch_size / statistics.median(values)
        useful = meter.rates(batch_size, tokens, batch_size / rate)  # without padding
        results.append({"variant": name, "samples_per_second": rate, "grouped_is_faster_by": ratio, **useful})
        print(f"{name:<16} {rate:9.2f} {ratio:18.2f}")
    return results


def main() -> int:
    """Time all variants, print a table and write the report."""
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = make_batch(arguments.batch_size, device)
    dtype = getattr(torch, arguments.dtype)
    steps = Variants(batch, device, dtype, arguments.compile, arguments.text_groups).steps()
    with torch.device(device):
        meter = FlopMeter(
            AmorLIPModel(AmorLIPConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG)), IMAGE_SIZE, CONTEXT
        )
    seconds = time_in_turns(steps, arguments.rounds, warmup_rounds=1)
    results = summarize(seconds, batch, meter)
    if arguments.output:
        about = {"command": " ".join(sys.argv), "device": device, "batch_size": arguments.batch_size}
        if device == "cuda":
            about |= {"gpu": torch.cuda.get_device_name(), "peak_memory": torch.cuda.max_memory_allocated()}
        arguments.output.write_text(json.dumps({**about, "results": results, "seconds": seconds}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
