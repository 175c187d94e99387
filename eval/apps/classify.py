"""Labels images in words of one's own.

    python eval/apps/classify.py photo.jpg more_photos --model outputs/emoji_demo --labels cat dog
    python eval/apps/classify.py photos --model USER/MODEL --labels_file labels.txt --top 3 --output labels.csv

Probabilities are over the labels given, by softmax; a model with a logit bias (SigLIP) judges each label by itself.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from eval.apps.image_files import encode_files, find_images, read_lines
from eval.evaluators.classification import build_classifier
from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


TEMPLATE = "a photo of a {}"


def embed_labels(model, processor, labels: list[str], template: str = TEMPLATE) -> Tensor:
    """Unit-norm embeddings [C, d] of labels in their template.

    Raises:
        UserError: the template has no place for a label, or there are too few labels to choose from.
    """
    if "{}" not in template:
        raise UserError(f"The template {template!r} has no {{}} where the label goes.")
    fewest = 2 if _bias(model) is None else 1
    if len(labels) < fewest:
        raise UserError(f"{len(labels)} labels given, {fewest} or more are needed: probabilities are over the labels.")
    return build_classifier(model, processor, labels, [template])


def label_probabilities(model, image_embeds: Tensor, label_embeds: Tensor) -> Tensor:
    """Probabilities [I, C] of labels [C, d] for images [I, d]: softmax(logit_scale * cosine) over the labels.

    With a logit bias they are sigmoid(logit_scale * cosine + bias), each label for itself (Zhai et al. 2023).
    """
    logits = model.logit_scale.detach().float().exp().cpu() * image_embeds @ label_embeds.T
    bias = _bias(model)
    return logits.softmax(-1) if bias is None else (logits + bias.detach().float().cpu()).sigmoid()


def _bias(model) -> Tensor | None:
    return getattr(model, "logit_bias", None)


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="image files, and folders searched with their subfolders")
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--labels", nargs="+", default=[], help="labels to choose from")
    parser.add_argument("--labels_file", type=Path, help="more of them, one a line")
    parser.add_argument("--template", default=TEMPLATE, help="what a label stands in; default: %(default)s")
    parser.add_argument("--top", type=int, default=5, help="labels to show for each image, likeliest first")
    parser.add_argument("--output", type=Path, help="CSV file to write: image, rank, label, probability")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at a time")
    arguments = parser.parse_args()
    if not arguments.images:
        raise UserError("No images given: name them first, or after --, as all that follows --labels is labels.")
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch_size must be 1 or more.")
    labels = arguments.labels + (read_lines(arguments.labels_file) if arguments.labels_file else [])
    labels = list(dict.fromkeys(labels))  # a label given twice would share its probability with itself
    paths = list(dict.fromkeys(image for path in arguments.images for image in find_images(path)))
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    label_embeds = embed_labels(model, processor, labels, arguments.template)
    embeds = encode_files(model, processor, paths, arguments.batch_size)
    if not embeds:
        raise UserError(f"None of the {len(paths)} images can be read.")
    probabilities = label_probabilities(model, torch.stack(list(embeds.values())), label_embeds)
    best = probabilities.topk(min(arguments.top, len(labels)))
    rows = [
        (path, rank, labels[i], probability)
        for path, values, places in zip(embeds, best.values.tolist(), best.indices.tolist(), strict=True)
        for rank, (probability, i) in enumerate(zip(values, places, strict=True), 1)
    ]
    for path, rank, label, probability in rows:
        if rank == 1:
            print(path)
        print(f"{100 * probability:6.2f} %  {label}")
    if arguments.output:
        write_csv(arguments.output, rows)


def write_csv(path: Path, rows: list[tuple[Path, int, str, float]]) -> None:
    """A row an image and label; raises `UserError` where nothing can be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "rank", "label", "probability"])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
