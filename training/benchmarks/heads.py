"""How well each amortizer head learns the log-partitions of a trained model, with each amortization objective.

python training/benchmarks/heads.py --model outputs/emoji_demo --output training/benchmarks/heads.json

The embeddings of the whole training set are computed once and stay as they are. The exact log-partition of an image is
the log-mean-exp of its logits with *all* texts of the set, and the other way round. A head sees batches of 64 pairs
only, as in training, and is then compared with the exact values: root mean square of the difference with its mean taken
off, in nats, over the whole set and both directions. `batch estimate` is the error of what a batch of 64 says itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from torch import Tensor

from eval.models import load_model
from modeling_amorlip import AmorLIPAmortizer, amortization_loss, log_partitions
from modeling_amorlip.configuration_amorlip import HEAD_TYPES, AmorLIPAmortizerConfig
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from modeling_amorlip.loss_amorlip import AMORTIZATION_OBJECTIVES


POSITIVE_WEIGHT = 1e-3


def exact_log_partitions(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """log mean_j exp(s <x_i, y_j>) and its counterpart for texts, [2, N]."""
    log_z = torch.stack(log_partitions(x, y, scale, positive_weight=1.0))
    return log_z - torch.tensor(float(len(x))).log()


def error(predictions: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference of [2, N] tensors, each direction's mean taken off."""
    difference = predictions - exact
    return (difference - difference.mean(1, keepdim=True)).square().mean().sqrt().item()


def batches(n: int, batch_size: int, epochs: int):
    """Index tensors: `epochs` passes in orders of their own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator)[: n // batch_size * batch_size].split(batch_size)


def batch_estimates(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What one batch says of its own samples' log-partitions, as a mean over its pairs, [2, N]."""
    log_z = torch.stack(log_partitions(x, y, scale, positive_weight=POSITIVE_WEIGHT))
    return log_z - torch.tensor(len(x) - 1 + POSITIVE_WEIGHT).log()


def batch_error(x: Tensor, y: Tensor, scale: Tensor, exact: Tensor, batch_size: int) -> float:
    """`error` of what batches say of their own samples."""
    estimates = torch.zeros_like(exact)
    seen = list(batches(len(x), batch_size, 1))
    for rows in seen:
        estimates[:, rows] = batch_estimates(x[rows], y[rows], scale)
    seen = torch.cat(seen)
    return error(estimates[:, seen], exact[:, seen])


def learn(config, x: Tensor, y: Tensor, scale: Tensor, objective: str, arguments: argparse.Namespace) -> Tensor:
    """Predictions [2, N] of a head that was fitted to batches, as the moving average of its weights."""
    torch.manual_seed(0)
    amortizer = AmorLIPAmortizer(config)
    parameters, average = list(amortizer.parameters()), []
    optimizer = torch.optim.Adam(parameters, lr=arguments.learning_rate) if parameters else None
    recent = torch.zeros(0, dtype=torch.long)
    for step, rows in enumerate(batches(len(x), arguments.batch_size, arguments.epochs)):
        a, b = x[rows], y[rows]
        with torch.no_grad():
            targets = batch_estimates(a, b, scale)
            if arguments.target_queue:
                recent = torch.cat([recent, rows])[-arguments.target_queue :]
                logits = scale * torch.stack([a @ y[recent].T, b @ x[recent].T])
                targets = logits.logsumexp(2) - torch.tensor(float(len(recent))).log()
            if amortizer.observes:
                amortizer.observe(a, b)
            if step == 0:
                amortizer.reset_parameters()
                means = [[v.mean() for v in values] for values in (targets, amortizer(a, b, scale))]
                amortizer.start_at(*means)
                average = [p.detach().clone() for p in parameters]
            elif step == len(x) // arguments.batch_size and config.amortizer_config.head_type == "prototype":
                amortizer.reset_parameters()  # once a whole epoch of embeddings has been seen
                average = [p.detach().clone() for p in parameters]
        for _ in range(arguments.steps if parameters else 0):
            predictions = amortizer(a, b, scale)
            loss = sum(amortization_loss(p, t, objective=objective) for p, t in zip(predictions, targets, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for mean, parameter in zip(average, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - arguments.ema_decay)
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            parameter.copy_(mean)
        return torch.stack(amortizer(x, y, scale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--data", default="demo_data/emoji/train.parquet", help="parquet of images and captions")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3, help="Adam steps a batch (T_lambda)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--size", type=int, default=1024, help="prototypes, features, or embeddings in the queue")
    parser.add_argument("--target_queue", type=int, default=0, help="fit to what the last N pairs say; 0: a batch")
    parser.add_argument("--head_types", nargs="+", choices=HEAD_TYPES, default=HEAD_TYPES)
    parser.add_argument("--objectives", nargs="+", choices=AMORTIZATION_OBJECTIVES, default=AMORTIZATION_OBJECTIVES)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

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
    results = []
    for head_type in arguments.head_types:
        for objective in arguments.objectives if head_type != "queue" else ("none",):
            model.config.amortizer_config = AmorLIPAmortizerConfig(head_type=head_type, size=arguments.size)
            predictions = learn(model.config, x, y, scale, objective, arguments)
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
