"""Measure time and memory of one loss step (batch estimate, loss and all gradients) against other implementations.

    python training/benchmarks/loss.py --sizes 1024 4096 16384 --threads 2 --output training/benchmarks/loss_cpu.json

All losses receive the same unit-norm embeddings and logit scale. They are timed in turns; the report holds medians and
ratios to `straightforward`. Peak memory is measured in a new process per loss and size: the memory that one step adds
to a process that already holds its inputs and has made a small step.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_amorlip.loss_amorlip import amortized_contrastive_loss, log_partitions, sigmoid_contrastive_loss
from training.benchmarks.timing import time_in_turns


LOGIT_SCALE, POSITIVE_WEIGHT = 50.0, 1e-3
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return AmorLIP's loss: both batch estimates without gradient, then the loss against log lambda."""
    with torch.no_grad():
        log_z_image, log_z_text = log_partitions(x, y, s, positive_weight=POSITIVE_WEIGHT)
    return amortized_contrastive_loss(x, y, s, log_z_image, log_z_text, positive_weight=POSITIVE_WEIGHT)


def _whole_matrix(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits and both directions' log-partitions of the weighted logits."""
    logits = s * x @ y.T
    weighted = logits + torch.eye(len(x), device=x.device) * math.log(POSITIVE_WEIGHT)
    return logits, weighted.logsumexp(1), weighted.logsumexp(0)


def _whole_matrix_loss(matrix: tuple[Tensor, ...], log_lambda_image: Tensor, log_lambda_text: Tensor) -> Tensor:
    logits, log_z_image, log_z_text = matrix
    partition_term = (log_z_image - log_lambda_image).exp().mean() + (log_z_text - log_lambda_text).exp().mean()
    return partition_term - 2 * logits.diagonal().mean()


def straightforward(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return the same loss from two whole matrices, one for the estimate and one for the loss, by autograd."""
    with torch.no_grad():
        _, *log_lambda = _whole_matrix(x, y, s)
    return _whole_matrix_loss(_whole_matrix(x, y, s), *log_lambda)


def straightforward_kept(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return the same loss from one whole matrix, which the estimate and the loss share."""
    matrix = _whole_matrix(x, y, s)
    return _whole_matrix_loss(matrix, matrix[1].detach(), matrix[2].detach())


def infonce(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return CLIP's loss as commonly written."""
    logits, labels = s * x @ y.T, torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def ours_infonce(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return CLIP's loss computed on tiles."""
    log_z = log_partitions(x, y, s, positive_weight=1.0)
    return ((log_z[0] + log_z[1]) / 2 - s * (x * y).sum(1)).mean()


def ours_siglip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return SigLIP's loss computed on tiles."""
    return sigmoid_contrastive_loss(x, y, s, logit_bias=-10.0)


def losses() -> dict[str, Loss]:
    """Return the losses by name, with those of open_clip where it is installed."""
    own = (ours, straightforward, straightforward_kept, infonce, ours_infonce, ours_siglip)
    by_name: dict[str, Loss] = {loss.__name__: loss for loss in own}
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except ImportError:
        return by_name
    clip, siglip = ClipLoss(), SigLipLoss()
    by_name["open_clip_ClipLoss"] = lambda x, y, s: clip(x, y, s)
    by_name["open_clip_SigLipLoss"] = lambda x, y, s: siglip(x, y, s, torch.tensor(-10.0, device=x.device))
    return by_name


@dataclass
class Settings:
    """What all losses have in common; see the command line's help."""

    dim: int
    device: str
    dtype: str
    rounds: int
    threads: int

    def inputs(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image and text embeddings [n, dim] of unit norm, and the logit scale."""
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.dtype)
        x, y = (
            F.normalize(torch.randn(n, self.dim, generator=generator), dim=-1).to(self.device, dtype) for _ in range(2)
        )
        return x.requires_grad_(), y.requires_grad_(), torch.tensor(LOGIT_SCALE, device=self.device, requires_grad=True)


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compute the value and all gradients."""
    torch.autograd.grad(loss(*inputs), inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()


def matrix_products(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compute the four products that every tiled implementation needs: the logits twice, and both gradients."""
    with torch.no_grad():
        x, y, _ = inputs
        for start in range(0, len(x), 8192):
            part = x[start : start + 8192]
            weights = part @ y.T
            torch.mm(part, y.T, out=weights)
            torch.mm(weights, y)
            torch.mm(weights.T, part)
    if x.is_cuda:
        torch.cuda.synchronize()


def measure_times(names: list[str], n: int, settings: Settings) -> dict[str, list[float]]:
    """Return the seconds of the steps of each loss and of the bare matrix products."""
    inputs = settings.inputs(n)
    calls: dict[str, Callable[[], None]] = {name: functools.partial(step, losses()[name], inputs) for name in names}
    calls["matrix_products"] = functools.partial(matrix_products, inputs)
    return time_in_turns(calls, settings.rounds, warmup_rounds=1)


def measure_memory(name: str, n: int, settings: Settings) -> float:
    """Return the peak memory that one step adds to this process, in MB."""
    loss = losses()[name]
    inputs = settings.inputs(n)
    step(loss, settings.inputs(64))
    if settings.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _process_status("VmRSS")
    step(loss, inputs)
    return (_process_status("VmHWM") - before) / 2**10


def _process_status(field: str) -> int:
    """Return a value of /proc/self/status in kB (Linux); a process would inherit ru_maxrss from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure_memory_in_new_process(name: str, n: int, settings: Settings) -> float:
    """Return `measure_memory` of a new process."""
    command = [sys.executable, __file__, "--memory_of", name, str(n)]
    for option in ("dim", "threads", "device", "dtype"):
        command += [f"--{option}", str(getattr(settings, option))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_size(n: int, names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Return a row per loss at one number of pairs, and print it."""
    medians = {name: statistics.median(seconds) for name, seconds in measure_times(names, n, settings).items()}
    base, rows = medians.get("straightforward"), []
    for name, seconds in medians.items():
        row = {"n": n, "name": name, "seconds": seconds, "ratio": base and seconds / base}
        if name != "matrix_products":
            row["peak_mb"] = measure_memory_in_new_process(name, n, settings)
        rows.append(row)
        ratio, peak = (f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("ratio", "peak_mb"))
        print(f"{n:7d} {name:<22} {1000 * seconds:9.1f} {ratio:>6} {peak:>9}", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and memory over the number of pairs, all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in zip(axes, ("seconds", "peak_mb"), ("seconds per step", "peak MB added"), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["n"], row[key]) for row in rows if row["name"] == name and row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="numbers of pairs")
    parser.add_argument("--dim", type=int, default=512, help="embedding size (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per loss (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    parser.add_argument(
        "--largest_matrix", type=int, default=16384, help="largest number of pairs for whole matrices (default: 16384)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; a plot of the same name goes beside it")
    parser.add_argument("--memory_of", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure all losses at all sizes, print a table and write report and plot."""
    arguments = parse_arguments()
    settings = Settings(arguments.dim, arguments.device, arguments.dtype, arguments.rounds, arguments.threads)
    torch.set_num_threads(settings.threads)
    if arguments.memory_of:
        name, n = arguments.memory_of
        print(measure_memory(name, int(n), settings))
        return 0
    rows = []
    print(f"{'pairs':>7} {'loss':<22} {'ms':>9} {'ratio':>6} {'peak MB':>9}")
    for n in arguments.sizes:
        names = [name for name in losses() if name.startswith("ours") or n <= arguments.largest_matrix]
        rows += measure_size(n, names, settings)
    if arguments.output:
        processor = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor()
        about = {"command": " ".join(sys.argv), "torch": torch.__version__, "processor": processor}
        arguments.output.write_text(json.dumps({**about, "results": rows}, indent=2) + "\n")
        plot(rows, arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
