"""Pictures of a run: held-out images with their best captions, and curves of training."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def contact_sheet(images, names: list[str], best: list[list[str]], path: str | Path) -> None:
    """Draws images with their five best captions, likeliest first; the right one is green."""
    columns = 6
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name, captions in zip(axes.flat, images, names, best, strict=False):
        axis.imshow(image)
        for line, caption in enumerate(captions[:5]):
            text = caption if len(caption) <= 30 else caption[:29] + "…"
            axis.text(
                0.5, -0.08 - 0.13 * line, text, transform=axis.transAxes, ha="center", va="top", fontsize=8,
                color="green" if caption == name else "black", weight="bold" if caption == name else "normal",
            )  # fmt: skip
    figure.subplots_adjust(hspace=0.85, left=0.02, right=0.98, top=0.98, bottom=0.1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def training_curves(metrics_file: str | Path, path: str | Path) -> None:
    """Plots loss, logit scale and, where it was logged, the log-partition error against the step."""
    lines = [json.loads(line) for line in Path(metrics_file).read_text(encoding="utf-8").splitlines()]
    titles = {"loss": "loss", "logit_scale": "logit scale", "partition_error": "log-partition error (nats)"}
    shown = [name for name in titles if name in lines[0]]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 3.2), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
        axis.set_title(titles[name])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
