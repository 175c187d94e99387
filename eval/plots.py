"""Figures: contact sheets of images with captions, training curves, and scores."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SHEET_COLUMNS, SHEET_CAPTIONS = 6, 5
CURVES = {"loss": "loss", "logit_scale": "logit scale", "partition_error": "log-partition error (nats)"}


def contact_sheet(
    images: Sequence[Image.Image | None],
    names: Sequence[str],
    best: Sequence[Sequence[str]],
    path: str | Path,
    headings: dict[int, str] | None = None,
) -> None:
    """Draw images, six per row, with up to five captions each; a caption that equals the image's name is green.

    Args:
        images: None leaves a place empty.
        names: True caption of each image.
        best: Captions of each image, most likely first.
        headings: {place: text} to write above an image.
    """
    rows = -(-len(images) // SHEET_COLUMNS)
    space = 0.2 + 0.13 * max(len(captions[:SHEET_CAPTIONS]) for captions in best) + (0.25 if headings else 0)
    size = (2.6 * SHEET_COLUMNS, 1.35 * (1 + space) * rows)
    figure, axes = _subplots(rows, SHEET_COLUMNS, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, (axis, image, name, captions) in enumerate(zip(axes.flat, images, names, best, strict=False)):
        if headings and place in headings:
            axis.set_title(headings[place], loc="left", fontsize=12, weight="bold", parse_math=False)
        if image is not None:
            axis.imshow(image)
            _write_captions(axis, name, captions)
    figure.subplots_adjust(hspace=space, left=0.02, right=0.98, top=0.98, bottom=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what no font has
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.2)


def _write_captions(axis: Axes, name: str, captions: Sequence[str]) -> None:
    for line, caption in enumerate(captions[:SHEET_CAPTIONS]):
        axis.text(
            0.5,
            -0.08 - 0.13 * line,
            caption if len(caption) <= 30 else caption[:29] + "…",
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=8,
            color="green" if caption == name else "black",
            weight="bold" if caption == name else "normal",
            parse_math=False,
        )


def training_curves(logs: dict[str, Path], path: str | Path | BinaryIO) -> None:
    """Plot loss, logit scale and, where logged, the log-partition error against the step: {run: metrics.jsonl}."""
    runs = {
        name: [json.loads(line) for line in Path(log).read_text(encoding="utf-8").split("\n")[:-1]]
        for name, log in logs.items()
    }
    logged = [name for name in CURVES if any(name in lines[0] for lines in runs.values())]
    figure, axes = _subplots(1, len(logged), figsize=(4.5 * len(logged), 3.2), squeeze=False)
    for axis, name in zip(axes[0], logged, strict=True):
        for run, lines in runs.items():
            if name in lines[0]:
                axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1, label=run)
        axis.set_title(CURVES[name])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=8)
    _save(figure, path)


def difference_bars(scores: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw bars of each run's scores minus the first run's: {run: {score: per cent}}, all with the same scores."""
    (first, base), *others = scores.items()
    figure, axis = _subplots(figsize=(max(5, 0.45 * len(base) * len(others) + 2), 3.8))
    width = 0.8 / len(others)
    for number, (run, values) in enumerate(others):
        offset = (number - (len(others) - 1) / 2) * width
        differences = [values[name] - base[name] for name in base]
        axis.bar([place + offset for place in range(len(base))], differences, width, label=run)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(base)), list(base), rotation=45, ha="right", fontsize=8)
    axis.set_ylabel(f"points over {first}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    _save(figure, path)


def score_bars(scores: Sequence[tuple[str, float, Sequence[float] | None, float | None]], path: str | Path) -> None:
    """Draw bars of scores: (task, value, 95 % interval or None, score of guessing or None), all as fractions.

    The score of guessing is a black mark.
    """
    figure, axis = _subplots(figsize=(7, 1 + 0.24 * len(scores)))
    for place, (_, value, interval, random_score) in enumerate(scores):
        axis.barh(place, 100 * value, height=0.7, color="tab:blue")
        if interval:  # of few resamples, it may lie beside the value
            axis.plot([100 * bound for bound in interval], [place, place], color="gray")
        if random_score is not None:
            axis.plot([100 * random_score] * 2, [place - 0.35, place + 0.35], color="black")
    axis.set_yticks(range(len(scores)), [name for name, *_ in scores], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("main metric, %")
    axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def radar(scores: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw scores on axes around a circle, each axis from 0 to its best run: {run: {score: value}}."""
    names = list(next(iter(scores.values())))
    best = {name: max(values[name] for values in scores.values()) or 1 for name in names}
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    figure, axis = _subplots(figsize=(6, 5), subplot_kw={"projection": "polar"})
    for run, values in scores.items():
        radii = [values[name] / best[name] for name in names]
        axis.plot([*angles, angles[0]], [*radii, radii[0]], label=run, linewidth=1.2)
    axis.set_xticks(angles, names, fontsize=7)
    axis.set_yticks([0.25, 0.5, 0.75, 1], [])
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.2, -0.15))
    _save(figure, path)


def lines_with_bands(lines: dict[str, dict[float, list[float]]], x: str, y: str, path: str | Path) -> None:
    """Draw means over runs with bands of one standard deviation: {line: {x: values}}; x has a scale of base 2."""
    figure, axis = _subplots(figsize=(6.5, 4.2))
    for name, points in lines.items():
        places = sorted(points)
        means = [statistics.mean(points[place]) for place in places]
        deviations = [statistics.stdev(points[p]) if len(points[p]) > 1 else 0 for p in places]
        (line,) = axis.plot(places, means, marker="o", markersize=3, label=name)
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axis.fill_between(places, low, high, alpha=0.15, color=line.get_color())
    axis.set_xscale("log", base=2)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes; matplotlib is imported with the first, since most programs draw none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Figure, path: str | Path | BinaryIO) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
