"""Measure and check on one GPU what touches CUDA: loss kernels, precision, compilation, FSDP2 and the speed of a step.

    python training/benchmarks/gpu.py --output outputs/gpu.json

Needs no network and takes some minutes. Every claim is a line of the table; the exit status is 1 if one of them fails.
Without a GPU, or with --small, the same checks run on little data on the CPU, and what needs a GPU is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch._dynamo.utils import counters

from modeling_amorlip.loss_amorlip import amortized_contrastive_loss, log_partitions
from training.build import build_trainer
from training.config import PretrainConfig
from training.objectives import OBJECTIVES
from training.trainer import Trainer


ROOT = Path(__file__).resolve().parents[2]
TINY_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, Any] = {
    "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **TINY_TOWER},
    "text_config": {"model_type": "clip_text_model", "vocab_size": 700, "max_position_embeddings": 32, **TINY_TOWER},
    "projection_dim": 32,
    "per_device_train_batch_size": 16,
}
FULL: dict[str, Any] = {  # the defaults of Transformers' configurations are CLIP's ViT-B/32
    "vision_config": {"model_type": "clip_vision_model"},
    "text_config": {"model_type": "clip_text_model"},
    "per_device_train_batch_size": 1024,
}


@dataclass
class Claim:
    """A figure, and whether it is within its limit; None for one that is not measured here."""

    name: str
    value: float | None
    limit: str
    holds: bool | None


def at_most(name: str, value: float, limit: float) -> Claim:
    """Return the claim that a value is finite and at most a limit."""
    return Claim(name, value, f"<= {limit:g}", value <= limit)


def figure(name: str, value: float) -> Claim:
    """Return a figure that has no limit."""
    return Claim(name, value, "", None)


@dataclass
class Setting:
    """Where and how large to measure."""

    device: torch.device
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def embeddings(self, pairs: int, dtype: torch.dtype, dim: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit-norm image and text embeddings [pairs, dim] that need gradients, and a logit scale []."""
        generator = torch.Generator(self.device).manual_seed(0)
        rows = torch.randn(2, pairs, dim, generator=generator, device=self.device)
        image, text = torch.nn.functional.normalize(rows, dim=-1).to(dtype)
        return image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, device=self.device)

    def seconds(self, call: Callable[[], Any], rounds: int = 5) -> float:
        """Return the shortest time of a call, after one that is not counted."""
        times = []
        for _ in range(rounds + 1):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def loss_with_gradients(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    """Return AmorLIP's loss against the batch's partitions, and its gradients."""
    with torch.no_grad():
        log_z = log_partitions(image, text, scale)
    loss = amortized_contrastive_loss(image, text, scale, *log_z)
    return [loss, *torch.autograd.grad(loss, (image, text))]


def exact_loss_with_gradients(image: Tensor, text: Tensor, scale: Tensor, weight: float = 1e-3) -> list[Tensor]:
    """Return the same in float64 from the whole matrix of logits."""
    image, text = (x.detach().double().requires_grad_() for x in (image, text))
    logits = scale.double() * image @ text.T
    weighted = logits + torch.eye(len(image), device=image.device, dtype=torch.float64) * torch.tensor(weight).log()
    terms = [(z - z.detach()).exp().mean() for z in (weighted.logsumexp(1), weighted.logsumexp(0))]
    loss = terms[0] + terms[1] - 2 * logits.diagonal().mean()
    return [loss, *torch.autograd.grad(loss, (image, text))]


@torch.no_grad()
def multiply_four_times(image: Tensor, text: Tensor) -> list[Tensor]:
    """Return the products of a loss and its gradients, with the logits twice, as both passes need them."""
    logits = image @ text.T
    return [image @ text.T, logits @ text, logits.T @ image]


def check_kernels(setting: Setting) -> list[Claim]:
    """Compare loss and gradients with float64, for inputs of every type."""
    pairs, claims = 256 if setting.small else 4096, []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = setting.embeddings(pairs, dtype)
        ours, exact = loss_with_gradients(*inputs), exact_loss_with_gradients(*inputs)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
        # Gradients are returned in the type of the inputs, which rounds them.
        claims.append(at_most(f"loss error, {dtype}", errors[0], 1e-4))
        claims.append(at_most(f"gradient error, {dtype}", max(errors[1:]), 4 * torch.finfo(dtype).eps + 1e-4))
    return claims


def check_loss_speed(setting: Setting) -> list[Claim]:
    """Compare the time of the loss with that of four matrix products, and measure its memory."""
    pairs = 1024 if setting.small else 32_768
    image, text, scale = setting.embeddings(pairs, torch.bfloat16 if setting.on_gpu else torch.float32)
    ratio = setting.seconds(lambda: loss_with_gradients(image, text, scale)) / setting.seconds(
        lambda: multiply_four_times(image, text)
    )
    claims = [figure(f"time of the loss over four matrix products, {pairs} pairs", ratio)]
    if not setting.on_gpu:
        return [*claims, Claim("memory of the loss, 262144 pairs, GiB", None, "<= 2", None)]
    inputs = setting.embeddings(262_144 if not setting.small else 16_384, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_with_gradients(*inputs)
    gigabytes = (torch.cuda.max_memory_allocated() - before) / 2**30
    return [*claims, at_most(f"memory of the loss, {len(inputs[0])} pairs, GiB", gigabytes, 2)]


@contextlib.contextmanager
def trainer_of(model: dict[str, Any], **fields: Any) -> Iterator[tuple[Trainer, dict[str, Any]]]:
    """Provide a trainer on the demo's pairs, and a batch of it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        data = str(ROOT / "demo_data/emoji/train.parquet")
        config = PretrainConfig(
            output_dir=folder, train_data=data, dataloader_num_workers=0, num_train_epochs=50, **{**model, **fields}
        )
        trainer = build_trainer(config)
        trainer.wrapped.train()
        batch = next(iter(trainer.dataloader))
        batch.pop("bad_samples", None)
        trainer.module.start_epoch(0, 1)
        yield trainer, batch


def losses_of(model: dict[str, Any], steps: int, **fields: Any) -> list[float]:
    """Return the losses of the first steps on one batch."""
    with trainer_of(model, **fields) as (trainer, batch):
        return [trainer.training_step(batch)["loss"].item() for _ in range(steps)]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest difference, relative to the largest value."""
    size = max(abs(value) for value in theirs)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / size


def check_objectives(setting: Setting) -> list[Claim]:
    """Take a step of every objective in which the host never waits for the device."""
    claims = []
    for name in OBJECTIVES:
        with trainer_of(TINY, objective=name) as (trainer, batch):
            trainer.training_step(batch)
            if setting.on_gpu:
                # Copying a batch from memory that is not pinned waits; the loader pins it.
                batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss = trainer.training_step(batch)["loss"]
            except RuntimeError as error:
                claims.append(Claim(f"step of {name}: {str(error).splitlines()[0][:80]}", None, "no waiting", False))
                continue
            finally:
                if setting.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            claims.append(Claim(f"step of {name}, loss", loss.item(), "no waiting", bool(loss.isfinite())))
    return claims


def check_precision(setting: Setting) -> list[Claim]:
    """Compare losses in half precision with those in float32."""
    steps = 4 if setting.small else 50
    exact = losses_of(TINY, steps, objective="clip", mixed_precision="no")
    precisions = ("bf16", "fp16") if setting.on_gpu else ("bf16",)
    claims = [
        at_most(
            f"losses in {precision} against float32",
            largest_difference(losses_of(TINY, steps, objective="clip", mixed_precision=precision), exact),
            0.02,
        )
        for precision in precisions
    ]
    return claims if setting.on_gpu else [*claims, Claim("losses in fp16 against float32", None, "<= 0.02", None)]


def check_compilation(setting: Setting) -> list[Claim]:
    """Compare losses with and without compilation, and count graph breaks."""
    if not setting.on_gpu:
        return [Claim("losses compiled against not compiled", None, "<= 1e-05", None)]
    fields = {"objective": "clip", "mixed_precision": "no"}
    eager = losses_of(TINY, 5, **fields)
    torch._dynamo.reset()
    counters.clear()
    difference = largest_difference(losses_of(TINY, 5, **fields, compile=True), eager)
    breaks = float(sum(counters["graph_break"].values()))
    return [at_most("losses compiled against not compiled", difference, 1e-5), at_most("graph breaks", breaks, 0)]


def check_sharding(setting: Setting) -> list[Claim]:
    """Compare losses of a sharded model with those of a whole one, in one process."""
    fields = {"objective": "clip", "mixed_precision": "no"}
    whole = losses_of(TINY, 4, **fields)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if setting.on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            sharded = losses_of(TINY, 4, **fields)
        finally:
            dist.destroy_process_group()
    return [at_most("losses with FSDP2 against a whole model", largest_difference(sharded, whole), 1e-5)]


def check_step(setting: Setting) -> list[Claim]:
    """Measure a training step with texts in groups of similar length, and with all texts padded to the context."""
    model, claims = TINY if setting.small else FULL, []
    for name, fields in (("in 4 groups", {"text_groups": 4}), ("padded", {"pad_text_to_multiple": -1})):
        with trainer_of(model, **fields) as (trainer, batch):
            pairs = len(batch["input_ids"])
            seconds = setting.seconds(lambda trainer=trainer, batch=batch: trainer.training_step(batch), 3)  # type: ignore[misc]
            tokens = sum(batch["lengths"]) if "groups" in name else batch["input_ids"].numel()
            claims.append(figure(f"pairs per second, texts {name}", pairs / seconds))
            rates = trainer.flops.rates(pairs, tokens, seconds)
            claims += [figure(f"{key}, texts {name}", value) for key, value in rates.items()]
    return claims


CHECKS = (
    check_kernels,
    check_loss_speed,
    check_objectives,
    check_precision,
    check_compilation,
    check_sharding,
    check_step,
)


def print_claims(claims: list[Claim]) -> None:
    """Print a table of claims."""
    words = {True: "holds", False: "FAILS", None: ""}
    for claim in claims:
        value = "not run" if claim.value is None and claim.holds is None else f"{claim.value or 0:.4g}"
        print(f"{claim.name:<64} {value:>10} {claim.limit:<12} {words[claim.holds]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="measure on little data, as on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Run all checks, print a table, write the report, and return 1 if a claim fails."""
    arguments = parse_arguments()
    on_gpu = torch.cuda.is_available()
    setting = Setting(torch.device("cuda" if on_gpu else "cpu"), small=arguments.small or not on_gpu)
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()}, no GPU"
    claims: list[Claim] = []
    for check in CHECKS:
        claims += check(setting)
    print(f"Device      {device}")
    print_claims(claims)
    failed = [claim.name for claim in claims if claim.holds is False]
    print(f"Failing     {'; '.join(failed)}" if failed else "Every claim that was checked holds.")
    if arguments.output:
        report = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__}
        arguments.output.write_text(
            json.dumps({**report, "claims": [asdict(claim) for claim in claims]}, indent=2) + "\n"
        )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
