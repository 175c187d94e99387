"""Search a folder of images in words.

    python eval/apps/search.py --model outputs/emoji_demo --images pictures "a red heart" "a cat" --sheet results.png

Embeddings are kept in an index beside the folder, or in --index FILE, so the next search encodes only new and changed
images. --scoring gallery and --scoring amortized subtract from each image's cosine what it scores with any query (its
log-partition), so images that resemble everything no longer come first for every query. gallery computes it over the
queries given, or over typical queries in a file (--queries FILE): the more and the more typical, the better.
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
from PIL import Image
from torch import Tensor

from eval.apps.image_files import read_image, read_lines
from eval.apps.image_index import default_index, index_images
from eval.apps.outputs import check_writable, escape_unencodable_output, printable, unwritable
from eval.models import load_model, revision
from eval.plots import contact_sheet
from eval.scoring import SCORINGS, log_partition_corrections, require_amortizer
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_texts


SHEET_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
SHEET_COLUMNS = 6


@dataclass
class SearchResult:
    """An image found for a query; `rank` counts from 1, `score` is in units of the cosine."""

    query: str
    rank: int
    score: float
    image: str


def search(
    model: Any,
    processor: Any,
    queries: list[str],
    image_embeds: Tensor,
    scoring: str = "cosine",
    sample: list[str] | None = None,
) -> Tensor:
    """Return the scores [Q, I] of images [I, d] for each query, in units of the cosine.

    Args:
        scoring: `cosine`; `gallery` subtracts log sum_t exp(logit(t, image)) / logit_scale over the texts t of
            `sample`, `amortized` the estimate of the model's image head. A constant that all images share is left out.
        sample: texts that stand for all queries; by default the queries themselves. A query is not compared with
            itself: p and p / (1 - p) rank alike, but float32 cannot distinguish values next to p = 1.
    """
    texts = encode_texts(model, processor, queries)
    scores = texts @ image_embeds.T
    if scoring != "gallery":
        correction = log_partition_corrections(model, (scoring,), texts, image_embeds, "image")[scoring]
        return scores if correction is None else scores - correction
    sample = queries if sample is None else sample
    gallery = encode_texts(model, processor, sample)
    for row, query in zip(scores, queries, strict=True):
        others = gallery[[text != query for text in sample]]
        row -= log_partition_corrections(model, (scoring,), others, image_embeds, "image")[scoring]
    return scores


def check_scoring(model: Any, scoring: str, sample: list[str]) -> None:
    """Raise `UserError` when the model has no heads for `amortized`, or there is no other query for `gallery`."""
    require_amortizer(model, (scoring,))
    if scoring == "gallery" and len(set(sample)) < 2:
        raise UserError(
            "--scoring gallery compares with other queries, and there is only one: "
            "ask several at once, or name a file of queries, one per line, with --queries."
        )


def best_images(queries: Sequence[str], paths: Sequence[Path], scores: Tensor, top: int) -> list[SearchResult]:
    """Return the `top` images for each query by scores [Q, I], best first."""
    values, places = scores.topk(min(top, len(paths)))
    return [
        SearchResult(query, rank, score, str(paths[place]))
        for query, row_values, row_places in zip(queries, values.tolist(), places.tolist(), strict=True)
        for rank, (score, place) in enumerate(zip(row_values, row_places, strict=True), 1)
    ]


def print_results(results: Sequence[SearchResult]) -> None:
    """Print each query with its images below it."""
    for result in results:
        if result.rank == 1:
            print(printable(result.query))
        print(f"{result.rank:4d}  {result.score:7.4f}  {printable(result.image)}")


def draw_sheet(path: Path, results: Sequence[SearchResult]) -> None:
    """Draw a contact sheet: under each query its images, best first, with score and name."""
    images: list[Image.Image | None] = []
    captions: list[list[str]] = []
    headings: dict[int, str] = {}
    for result in results:
        if result.rank == 1:
            padding = -len(images) % SHEET_COLUMNS  # each query starts a row
            images += [None] * padding
            captions += [[]] * padding
            headings[len(images)] = printable(result.query)
        image = read_image(Path(result.image))
        image.thumbnail((256, 256))
        images.append(image)
        captions.append([f"{result.score:.3f}", printable(Path(result.image).name)])
    try:
        contact_sheet(images, [""] * len(images), captions, path, headings)
    except OSError as error:
        raise unwritable(path, "--sheet", error) from None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; raises `UserError` for options that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="+", help="description of the images to find")
    add("--model", required=True, help="folder or Hub repository of a dual encoder")
    add("--images", required=True, type=Path, help="folder of images, searched with its subfolders")
    add("--index", type=Path, help="file that keeps the embeddings (default: FOLDER.index.safetensors beside FOLDER)")
    add("--top", type=int, default=12, help="number of images to show per query (default: %(default)s)")
    add("--scoring", choices=SCORINGS, default="cosine", help="how to rank images, see above (default: %(default)s)")
    add("--queries", type=Path, help="text file of typical queries, one per line, for --scoring gallery")
    add("--sheet", type=Path, help=f"picture of the results to draw ({', '.join(SHEET_SUFFIXES)})")
    add("--batch_size", type=int, default=32, help="number of images to encode at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch_size must be 1 or more.")
    if arguments.queries and arguments.scoring != "gallery":
        raise UserError("--queries is for --scoring gallery alone.")
    if not arguments.images.is_dir():
        raise UserError(f"--images {printable(arguments.images)}: there is no such folder.")
    if arguments.sheet:
        check_writable(arguments.sheet, "--sheet", SHEET_SUFFIXES)
    return arguments


@cli_entry_point
def main() -> None:
    escape_unencodable_output()
    arguments = parse_arguments()
    sample = read_lines(arguments.queries) if arguments.queries else None
    file = arguments.index or default_index(arguments.images)
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_scoring(model, arguments.scoring, arguments.query if sample is None else sample)
    model_revision = revision(arguments.model, model)
    paths, embeds = index_images(model, processor, arguments.images, file, model_revision, arguments.batch_size)
    scores = search(model, processor, arguments.query, embeds, arguments.scoring, sample)
    results = best_images(arguments.query, paths, scores, arguments.top)
    print_results(results)
    if arguments.sheet:
        draw_sheet(arguments.sheet, results)


if __name__ == "__main__":
    sys.exit(main())
