"""Label images with names of your own.

    python eval/apps/classify.py photo.jpg more_photos --model outputs/emoji_demo --labels cat dog
    python eval/apps/classify.py "photos/**/*.jpg" https://example.org/a.png --model USER/MODEL --labels_file labels.txt

Images are files, folders, glob patterns and http or https URLs.

Probabilities are over the labels given (softmax). A model with a logit bias (SigLIP) judges each label independently
(sigmoid), so its probabilities need not sum to 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from eval.apps.image_files import ImageSource, encode_files, list_images
from eval.apps.outputs import TABLE_SUFFIXES, check_writable, printable, user_path, write_table
from eval.apps.texts import (
    check_encodable,
    clean_labels,
    describe_indistinguishable,
    find_indistinguishable,
    read_lines,
)
from eval.evaluators.classification import build_classifier
from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


TEMPLATE = "a photo of a {}"


@dataclass
class ImageLabel:
    """A label of an image; `rank` counts from 1, the likeliest."""

    image: str
    rank: int
    label: str
    probability: float


def check_template(template: str) -> None:
    """Raise `UserError` when a template has no place for the label."""
    if "{}" not in template:
        raise UserError(f"The template {template!r} has no {{}} where the label goes.")


def embed_labels(model: Any, processor: Any, labels: list[str], template: str = TEMPLATE) -> Tensor:
    """Return the unit-norm embeddings [C, d] of labels in a template.

    Raises:
        UserError: the template has no place for a label, or there are too few labels to choose from.
    """
    check_template(template)
    check_encodable([template, *labels])
    minimum = 2 if _logit_bias(model) is None else 1
    if len(labels) < minimum:
        raise UserError(
            f"Give {minimum} or more different labels, got {len(labels)}: probabilities are relative to the labels."
        )
    return build_classifier(model, processor, labels, [template])


def label_probabilities(model: Any, image_embeds: Tensor, label_embeds: Tensor) -> Tensor:
    """Return the probabilities [I, C] of labels [C, d] for images [I, d].

    They are softmax(logit_scale * cosine) over the labels (Radford et al. 2021, Section 3.1.2); for a model with a
    logit bias, sigmoid(logit_scale * cosine + logit_bias) of each label (Zhai et al. 2023, Section 3.2).
    """
    logits = model.logit_scale.detach().float().exp().cpu() * image_embeds @ label_embeds.T
    bias = _logit_bias(model)
    return logits.softmax(-1) if bias is None else (logits + bias.detach().float().cpu()).sigmoid()


def _logit_bias(model: Any) -> Tensor | None:
    return getattr(model, "logit_bias", None)


def label_images(
    model: Any,
    embeds: dict[ImageSource, Tensor],
    labels: Sequence[str],
    label_embeds: Tensor,
    top: int,
    tile_size: int = 1024,
) -> list[ImageLabel]:
    """Return the `top` labels of each image, likeliest first; probabilities of one tile of images are held at a time.

    Args:
        embeds: embedding [d] of each image. label_embeds: [C, d].
    """
    rows, sources = [], list(embeds)
    for start in range(0, len(sources), tile_size):
        tile = sources[start : start + tile_size]
        probabilities = label_probabilities(model, torch.stack([embeds[source] for source in tile]), label_embeds)
        rows += best_labels(tile, labels, probabilities, top)
    return rows


def best_labels(
    images: Sequence[ImageSource], labels: Sequence[str], probabilities: Tensor, top: int
) -> list[ImageLabel]:
    """Return the `top` labels of each image by probabilities [I, C], likeliest first."""
    values, places = probabilities.topk(min(top, len(labels)))
    return [
        ImageLabel(str(image), rank, labels[place], probability)
        for image, row_values, row_places in zip(images, values.tolist(), places.tolist(), strict=True)
        for rank, (probability, place) in enumerate(zip(row_values, row_places, strict=True), 1)
    ]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; raises `UserError` for values that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", help="image files, folders (searched with their subfolders), globs and URLs")
    add("--model", required=True, help="folder or Hub repository of a dual encoder")
    add("--labels", nargs="+", default=[], help="labels to choose from")
    add("--labels_file", type=user_path, help="text file of further labels, one per line")
    add("--template", default=TEMPLATE, help="text with {} where the label goes (default: %(default)s)")
    add("--top", type=int, default=5, help="number of labels to show per image (default: %(default)s)")
    add("--output", type=user_path, help="table of image, rank, label, probability to write, FILE.csv or FILE.json")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="folders to leave out, a glob; may be repeated",
    )
    add("--batch_size", type=int, default=32, help="number of images to encode at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.images:
        raise UserError("No images given: name them first, or after --, because all that follows --labels is labels.")
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch_size must be 1 or more.")
    check_template(arguments.template)
    if arguments.output:
        check_writable(arguments.output, "--output", TABLE_SUFFIXES)
    return arguments


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    labels = clean_labels(arguments.labels + (read_lines(arguments.labels_file) if arguments.labels_file else []))
    sources = list_images(arguments.images, arguments.exclude)
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    label_embeds = embed_labels(model, processor, labels, arguments.template)
    if groups := find_indistinguishable(labels, label_embeds):
        print(f"warning: {describe_indistinguishable(groups)}", file=sys.stderr)
    embeds = encode_files(model, processor, sources, arguments.batch_size)
    if not embeds:
        raise UserError(f"None of the {len(sources)} images can be read.")
    rows = label_images(model, embeds, labels, label_embeds, arguments.top)
    for row in rows:
        if row.rank == 1:
            print(printable(row.image))
        print(f"{100 * row.probability:6.2f} %  {printable(row.label)}")
    if arguments.output:
        write_table(arguments.output, "--output", rows)


if __name__ == "__main__":
    sys.exit(main())
