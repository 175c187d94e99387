"""Measure how well each amortizer head learns the log-partitions of a trained model, by amortization objective.

    python training/benchmarks/heads.py --model outputs/emoji_demo --epochs 40 --size 4096 \\
        --output training/benchmarks/heads.json

The embeddings of the whole training set are computed once and stay fixed. The exact log-partition of an image is the
log-mean-exp of its logits with *all* texts of the set, and likewise for texts. Each head is fitted to batches of 64
pairs, as in training, and then compared with the exact values: root mean square of the difference without its mean, in
nats, over the whole set and both directions. `batch estimate` is the error of the estimate from a batch of 64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from torch import Tensor

from eval.models import load_model
from modeling_amorlip import AmorLIPAmortizer, AmorLIPConfig, amortization_loss, log_partitions
from modeling_amorlip.configuration_amorlip import HEAD_TYPES, AmorLIPAmortizerConfig
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from modeling_amorlip.loss_amorlip import AMORTIZATION_OBJECTIVES


POSITIVE_WEIGHT = 1e-3


def exact_log_partitions(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return log mean_j exp(s <x_i, y_j>) and its counterpart for texts, [2, N]."""
    log_z = torch.stack(log_partitions(x, y, scale, positive_weight=1.0))
    return log_z - torch.tensor(float(len(x))).log()


def error(predictions: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference of [2, N] tensors, without the mean of each direction."""
    difference = predictions - exact
    return (difference - difference.mean(1, keepdim=True)).square().mean().sqrt().item()


def batches(n: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """Yield batches of indices over several epochs, each in a random order of its own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator)[: n // batch_size * batch_size].split(batch_size)


def batch_estimates(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return the log-partitions of a batch's samples as estimated from its pairs, log of a mean, [2, N]."""
    log_z = torch.stack(log_partitions(x, y, scale, positive_weight=POSITIVE_WEIGHT))
    return log_z - torch.tensor(len(x) - 1 + POSITIVE_WEIGHT).log()


def batch_error(x: Tensor, y: Tensor, scale: Tensor, exact: Tensor, batch_size: int) -> float:
    """Return the error of the estimates that batches make for their own samples."""
    estimates = torch.zeros_like(exact)
    epoch = list(batches(len(x), batch_size, 1))
    for rows in epoch:
        estimates[:, rows] = batch_estimates(x[rows], y[rows], scale)
    seen = torch.cat(epoch)
    return error(estimates[:, seen], exact[:, seen])


@dataclass
class FitSettings:
    """How heads are fitted; see the command line's help."""

    batch_size: int
    epochs: int
    steps: int
    learning_rate: float
    ema_decay: float
    target_queue: int


@dataclass
class Targets:
    """Log-partitions that heads are fitted to: from the batch, or from a queue of the last pairs seen."""

    x: Tensor
    y: Tensor
    scale: Tensor
    queue_size: int

    def __post_init__(self) -> None:
        self.recent = torch.zeros(0, dtype=torch.long)

    def __call__(self, rows: Tensor) -> Tensor:
        a, b = self.x[rows], self.y[rows]
        if not self.queue_size:
            return batch_estimates(a, b, self.scale)
        self.recent = torch.cat([self.recent, rows])[-self.queue_size :]
        logits = self.scale * torch.stack([a @ self.y[self.recent].T, b @ self.x[self.recent].T])
        return logits.logsumexp(2) - torch.tensor(float(len(self.recent))).log()


def learn(
    config: AmorLIPConfig, head_type: str, x: Tensor, y: Tensor, scale: Tensor, objective: str, fit: FitSettings
) -> Tensor:
    """Return predictions [2, N] of heads that were fitted to batches, with the moving average of their weights."""
    torch.manual_seed(0)
    amortizer, targets_of = AmorLIPAmortizer(config), Targets(x, y, scale, fit.target_queue)
    parameters: list[Tensor] = list(amortizer.parameters())
    average: list[Tensor] = []
    optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate) if parameters else None
    for step, rows in enumerate(batches(len(x), fit.batch_size, fit.epochs)):
        a, b = x[rows], y[rows]
        with torch.no_grad():
            targets = targets_of(rows)
            if amortizer.observes:
                amortizer.observe(a, b)
            if step == 0:
                amortizer.reset_parameters()
                amortizer.start_at(*[[v.mean() for v in values] for values in (targets, amortizer(a, b, scale))])
                average = [p.detach().clone() for p in parameters]
            elif step == len(x) // fit.batch_size and head_type == "prototype":
                amortizer.reset_parameters()  # a whole epoch of embeddings has been seen
                average = [p.detach().clone() for p in parameters]
        if optimizer:
            for _ in range(fit.steps):
                image, text = amortizer(a, b, scale)
                loss = amortization_loss(image, targets[0], objective=objective)
                loss = loss + amortization_loss(text, targets[1], objective=objective)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for mean, parameter in zip(average, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - fit.ema_decay)
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            parameter.copy_(mean)
        return torch.stack(amortizer(x, y, scale))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument(
        "--data",
        default="demo_data/emoji/train.parquet",
        help="parquet file with the columns image and caption (default: the demo's training set)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per batch (default: 64)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the pairs (default: 40)")
    parser.add_argument("--steps", type=int, default=3, help="Adam steps per batch, T_lambda (default: 3)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Adam's learning rate (default: 1e-3)")
    parser.add_argument("--ema_decay", type=float, default=0.999, help="decay of averaged weights (default: 0.999)")
    parser.add_argument(
        "--size", type=int, default=1024, help="prototypes, features or queued embeddings (default: 1024)"
    )
    parser.add_argument("--target_queue", type=int, default=0, help="last pairs that targets use; 0: the batch's only")
    parser.add_argument("--head_types", nargs="+", choices=HEAD_TYPES, default=HEAD_TYPES, help="default: all")
    parser.add_argument(
        "--objectives", nargs="+", choices=AMORTIZATION_OBJECTIVES, default=AMORTIZATION_OBJECTIVES, help="default: all"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Fit every head with every objective, print a table and write the report."""
    arguments = parse_arguments()
    model, processor = load_model(arguments.model)
    rows = datasets.load_dataset("parquet", data_files=arguments.data, split="train")
    x = encode_images(model, processor, (row["image"] for row in rows), 256)
    y = encode_texts(model, processor, list(rows["caption"]), 256)
    scale = model.logit_scale.detach().exp()
    exact = exact_log_partitions(x, y, scale)
    spread = error(torch.zeros_like(exact), exact)
    baseline = batch_error(x, y, scale, exact, arguments.batch_size)
    print(f"{len(x)} pairs, logit scale {scale:.1f}; exact log-partitions vary by {spread:.3f} nats (rms)")
    print(f"{'head':<18} {'objective':<10} {'rms error':>9} {'/ batch':>8} {'bias':>6}")
    print(f"{'batch estimate':<18} {'':<10} {baseline:9.3f} {1:8.2f}", flush=True)
    fit = FitSettings(
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        ema_decay=arguments.ema_decay,
        target_queue=arguments.target_queue,
    )
    results: list[dict[str, Any]] = []
    for head_type in arguments.head_types:
        for objective in arguments.objectives if head_type != "queue" else ("none",):
            model.config.amortizer_config = AmorLIPAmortizerConfig(head_type=head_type, size=arguments.size)
            predictions = learn(model.config, head_type, x, y, scale, objective, fit)
            value, bias = error(predictions, exact), (predictions - exact).mean().item()
            row = {"head_type": head_type, "objective": objective, "rms": value, "ratio": value / baseline}
            results.append(row | {"bias": bias})
            print(f"{head_type:<18} {objective:<10} {value:9.3f} {value / baseline:8.2f} {bias:6.2f}", flush=True)
    if arguments.output:
        about = {"command": " ".join(sys.argv), "logit_scale": scale.item(), "spread": spread, "batch_rms": baseline}
        arguments.output.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
