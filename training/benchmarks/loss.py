"""Time and memory of one loss step (batch estimate + loss + all gradients), ours beside others', in one run.

python training/benchmarks/loss.py --sizes 1024 4096 16384 --threads 2 --output training/benchmarks/loss_cpu.json

Every contender gets the same unit-norm embeddings and logit scale. Timings are interleaved, a round of all
contenders after the other; medians are reported, with ratios to `straightforward`. Peak memory is measured in a fresh
process a contender and size, as what one step adds to a process that has its inputs and has done a small step before.
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
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_amorlip.loss_amorlip import amortized_contrastive_loss, log_partitions, sigmoid_contrastive_loss


LOGIT_SCALE, POSITIVE_WEIGHT = 50.0, 1e-3


def ours(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """AmorLIP's step: estimate of both directions without gradient, then the loss against log lambda."""
    with torch.no_grad():
        log_z = log_partitions(x, y, s, positive_weight=POSITIVE_WEIGHT)
    return amortized_contrastive_loss(x, y, s, *log_z, positive_weight=POSITIVE_WEIGHT)


def _whole_matrix(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and both directions' log-partitions of the weighted logits."""
    logits = s * x @ y.T
    weighted = logits + torch.eye(len(x), device=x.device) * math.log(POSITIVE_WEIGHT)
    return logits, weighted.logsumexp(1), weighted.logsumexp(0)


def _whole_matrix_loss(matrix: tuple[Tensor, ...], log_lambda_image: Tensor, log_lambda_text: Tensor) -> Tensor:
    logits, log_z_image, log_z_text = matrix
    partition_term = (log_z_image - log_lambda_image).exp().mean() + (log_z_text - log_lambda_text).exp().mean()
    return partition_term - 2 * logits.diagonal().mean()


def straightforward(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The same two functions, estimate and loss, on the whole matrix, by autograd."""
    with torch.no_grad():
        _, *log_lambda = _whole_matrix(x, y, s)
    return _whole_matrix_loss(_whole_matrix(x, y, s), *log_lambda)


def straightforward_kept(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """As `straightforward`, with the estimate's matrix and its graph kept for the loss."""
    matrix = _whole_matrix(x, y, s)
    return _whole_matrix_loss(matrix, matrix[1].detach(), matrix[2].detach())


def infonce(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """CLIP's loss as commonly written."""
    logits, labels = s * x @ y.T, torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def ours_infonce(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """CLIP's loss on tiles."""
    log_z = log_partitions(x, y, s, positive_weight=1.0)
    return ((log_z[0] + log_z[1]) / 2 - s * (x * y).sum(1)).mean()


def ours_siglip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """SigLIP's loss on tiles."""
    return sigmoid_contrastive_loss(x, y, s, logit_bias=-10.0)


def contenders() -> dict[str, Callable]:
    """Name -> loss of (images, texts, scale); open_clip's where it can be imported."""
    known = {f.__name__: f for f in (ours, straightforward, straightforward_kept, infonce, ours_infonce, ours_siglip)}
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except ImportError:
        return known
    clip, siglip = ClipLoss(), SigLipLoss()
    return known | {
        "open_clip_ClipLoss": lambda x, y, s: clip(x, y, s),
        "open_clip_SigLipLoss": lambda x, y, s: siglip(x, y, s, torch.tensor(-10.0, device=x.device)),
    }


def make_inputs(n: int, dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, dim, generator=generator), dim=-1).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(LOGIT_SCALE, device=device, requires_grad=True)


def step(loss: Callable, inputs: tuple[Tensor, ...]) -> None:
    """Value and all gradients."""
    torch.autograd.grad(loss(*inputs), inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()


def matrix_products(inputs: tuple[Tensor, ...]) -> None:
    """The four products that no implementation on tiles can do without: logits twice, and both gradients."""
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


def measure_times(names: list[str], n: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of `rounds` steps a contender, interleaved, after one that is not counted."""
    inputs = make_inputs(n, arguments.dim, arguments.device, getattr(torch, arguments.dtype))
    runs: dict[str, Callable] = {name: functools.partial(step, contenders()[name], inputs) for name in names}
    runs["matrix_products"] = functools.partial(matrix_products, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(arguments.rounds + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_memory(name: str, n: int, arguments: argparse.Namespace) -> float:
    """MB that one step adds at its peak, in this process."""
    loss = contenders()[name]
    inputs = make_inputs(n, arguments.dim, arguments.device, getattr(torch, arguments.dtype))
    step(loss, make_inputs(64, arguments.dim, arguments.device, getattr(torch, arguments.dtype)))
    if arguments.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step(loss, inputs)
    return (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """A figure of this process in kB (Linux). ru_maxrss will not do: a process inherits it from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory over N, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in zip(axes, ("seconds", "peak_mb"), ("seconds a step", "peak MB added"), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["n"], row[key]) for row in rows if row["name"] == name and row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="numbers of pairs")
    parser.add_argument("--dim", type=int, default=512, help="embedding size")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a contender")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--largest_matrix", type=int, default=16384, help="largest N that whole matrices are tried at")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a PNG of the same name")
    parser.add_argument("--memory_of", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_memory(arguments.memory_of[0], int(arguments.memory_of[1]), arguments))
        return 0

    rows = []
    print(f"{'pairs':>7} {'contender':<22} {'ms':>9} {'ratio':>6} {'peak MB':>9}")
    for n in arguments.sizes:
        names = [name for name in contenders() if name.startswith("ours") or n <= arguments.largest_matrix]
        medians = {name: statistics.median(s) for name, s in measure_times(names, n, arguments).items()}
        base = medians.get("straightforward")
        for name, seconds in medians.items():
            row = {"n": n, "name": name, "seconds": seconds, "ratio": base and seconds / base}
            if name != "matrix_products":
                command = [sys.executable, __file__, "--memory_of", name, str(n)]
                for option in ("dim", "threads", "device", "dtype"):
                    command += [f"--{option}", str(getattr(arguments, option))]
                row["peak_mb"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(row)
            ratio, peak = (f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("ratio", "peak_mb"))
            print(f"{n:7d} {name:<22} {1000 * seconds:9.1f} {ratio:>6} {peak:>9}", flush=True)
    if arguments.output:
        about = {"command": " ".join(sys.argv), "torch": torch.__version__, "processor": platform.processor()}
        if arguments.device == "cuda":
            about["processor"] = torch.cuda.get_device_name()
        arguments.output.write_text(json.dumps({**about, "results": rows}, indent=2) + "\n")
        plot(rows, arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
