"""Search a folder of images by words, by a picture or by the URL of one.

    python eval/apps/search.py --model outputs/emoji_demo --images pictures "a red heart" "a cat" --sheet results.png
    python eval/apps/search.py --model outputs/emoji_demo --images pictures holiday/beach.jpg --output similar.json
    python eval/apps/search.py --model outputs/emoji_demo --images pictures --exclude thumbnails "old/*"

Embeddings are kept in an index beside the folder, or in --index FILE, so the next search encodes only new and changed
images. Without a query, only the index is updated. A query that names an image file, or is an http or https URL, finds
similar images; any other query is words.

--scoring exact, amortized and sinkhorn subtract from each image's cosine what it scores with any query in words (its
log-partition), so images that resemble everything no longer come first for every query. exact and sinkhorn compute it
over the queries given, or over typical queries in a file (--queries FILE): the more and the more typical, the better.
amortized estimates it with the model's image head.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor

from eval.apps.image_files import describe_error, read_image
from eval.apps.image_index import default_index, index_images
from eval.apps.image_urls import is_url
from eval.apps.outputs import TABLE_SUFFIXES, check_writable, printable, unwritable, user_path, write_table
from eval.apps.texts import check_encodable, read_lines
from eval.models import load_model, revision
from eval.plots import contact_sheet
from eval.scoring import SCORINGS, log_partition_corrections, require_amortizer
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from modeling_amorlip.images_amorlip import IMAGE_EXTENSIONS


EXACT = "exact" if "exact" in SCORINGS else "gallery"
SHEET_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
SHEET_COLUMNS = 6
MAX_SHEET_ROWS = 200  # pictures of 2^16 pixels and more cannot be written


@dataclass
class SearchResult:
    """An image found for a query; `rank` counts from 1, `score` is in units of the cosine."""

    query: str
    rank: int
    score: float
    image: str


def is_picture(query: str) -> bool:
    """Return whether a query is an image file or a URL rather than words."""
    path = user_path(query)
    return is_url(query) or (path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())


def encode_queries(model: Any, processor: Any, queries: Sequence[str]) -> Tensor:
    """Return the unit-norm embeddings [Q, d] of words and pictures; raises `UserError` for a broken picture."""
    pictures = {query: _read_query(query) for query in queries if is_picture(query)}
    words = [query for query in queries if query not in pictures]
    check_encodable(words)
    embeds: dict[str, Tensor] = {}
    if words:
        embeds |= zip(words, encode_texts(model, processor, words), strict=True)
    if pictures:
        embeds |= zip(pictures, encode_images(model, processor, pictures.values()), strict=True)
    return torch.stack([embeds[query] for query in queries])


def _read_query(query: str) -> Image.Image:
    try:
        return read_image(query if is_url(query) else user_path(query))
    except Exception as error:  # Pillow and urllib raise many kinds
        raise UserError(f"The query {printable(query)} cannot be read: {describe_error(error)}.") from None


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
        scoring: one of `SCORINGS`. `exact` subtracts log sum_t exp(logit(t, image)) / logit_scale over the texts t of
            `sample`. A constant that all images share is left out.
        sample: texts that stand for all queries; by default the queries themselves. For `exact`, a query is not
            compared with itself: p and p / (1 - p) rank alike, but float32 cannot distinguish values next to p = 1.
    """
    query_embeds = encode_queries(model, processor, queries)
    scores = query_embeds @ image_embeds.T
    if scoring in ("cosine", "amortized"):
        correction = log_partition_corrections(model, (scoring,), query_embeds, image_embeds, "image")[scoring]
        return scores if correction is None else scores - correction
    sample = list(dict.fromkeys(queries if sample is None else sample))
    sample_embeds = encode_texts(model, processor, sample)
    if scoring != EXACT:
        return scores - log_partition_corrections(model, (scoring,), sample_embeds, image_embeds, "image")[scoring]
    for row, query in zip(scores, queries, strict=True):
        others = sample_embeds[[text != query for text in sample]]
        row -= log_partition_corrections(model, (scoring,), others, image_embeds, "image")[scoring]
    return scores


def check_scoring(model: Any, scoring: str, queries: Sequence[str], sample: Sequence[str] | None = None) -> None:
    """Raise `UserError` when the model or the queries do not suffice for a way of scoring."""
    require_amortizer(model, (scoring,))
    if scoring == "cosine":
        return
    if any(is_picture(query) for query in queries):
        raise UserError(f"--scoring {scoring} is for queries in words; search with pictures by cosine.")
    if scoring != "amortized" and len(set(queries if sample is None else sample)) < 2:
        raise UserError(
            f"--scoring {scoring} compares with other queries, and there is only one: "
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
        images.append(_thumbnail(Path(result.image)))
        captions.append([f"{result.score:.3f}", printable(Path(result.image).name)])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for the character
            contact_sheet(images, [""] * len(images), captions, path, headings)
    except OSError as error:
        raise unwritable(path, "--sheet", error) from None


def _thumbnail(path: Path) -> Image.Image | None:
    """Return a small copy of an image; None for one in the index that can no longer be read."""
    try:
        image = read_image(path)
    except Exception as error:  # Pillow raises many kinds
        print(f"left out of the sheet: {printable(path)}: {describe_error(error)}", file=sys.stderr)
        return None
    image.thumbnail((256, 256))
    return image


def _scoring_name(name: str) -> str:
    """Return a scoring's present name; `gallery` is a former name of `exact`."""
    return EXACT if name in ("exact", "gallery") else name


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; raises `UserError` for options that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="*", help="words, an image file or the URL of an image (default: only update the index)")
    add("--model", required=True, help="folder or Hub repository of a dual encoder")
    add("--images", required=True, type=user_path, help="folder of images, searched with its subfolders")
    add("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help="folders to leave out, as globs")
    add("--index", type=user_path, help="file of embeddings (default: FOLDER.index.safetensors beside FOLDER)")
    add("--top", type=int, default=12, help="number of images to show per query (default: %(default)s)")
    add("--scoring", type=_scoring_name, choices=SCORINGS, default="cosine", help="how to rank (default: %(default)s)")
    add("--queries", type=user_path, help="text file of typical queries, one per line, for exact and sinkhorn")
    add("--output", type=user_path, help="table of the results to write, FILE.csv or FILE.json")
    add("--sheet", type=user_path, help=f"picture of the results to draw ({', '.join(SHEET_SUFFIXES)})")
    add("--batch_size", type=int, default=32, help="number of images to encode at a time (default: %(default)s)")
    arguments = parser.parse_args()
    _check_arguments(arguments)
    return arguments


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch_size must be 1 or more.")
    if arguments.queries and arguments.scoring in ("cosine", "amortized"):
        raise UserError("--queries is for --scoring exact and sinkhorn.")
    if not all(query.strip() for query in arguments.query):
        raise UserError("A query is empty; leave all queries out to only update the index.")
    if not arguments.query and (arguments.output or arguments.sheet or arguments.scoring != "cosine"):
        raise UserError("--output, --sheet and --scoring need a query.")
    if not arguments.images.is_dir():
        raise UserError(f"--images {printable(arguments.images)}: there is no such folder.")
    if arguments.output:
        check_writable(arguments.output, "--output", TABLE_SUFFIXES)
    if arguments.sheet:
        check_writable(arguments.sheet, "--sheet", SHEET_SUFFIXES)
        rows = len(arguments.query) * -(-arguments.top // SHEET_COLUMNS)
        if rows > MAX_SHEET_ROWS:
            raise UserError(f"--sheet would have {rows} rows, {MAX_SHEET_ROWS} at most: lower --top, or ask in parts.")
    for query in arguments.query:
        if Path(query).suffix.lower() in IMAGE_EXTENSIONS and not is_picture(query):
            print(f"{printable(query)} is no file; searching for it as words", file=sys.stderr)


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    queries, folder = arguments.query, arguments.images
    sample = read_lines(arguments.queries) if arguments.queries else None
    file = arguments.index or default_index(folder)
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_scoring(model, arguments.scoring, queries, sample)
    model_revision = revision(arguments.model, model)
    paths, embeds = index_images(
        model, processor, folder, file, model_revision, arguments.batch_size, arguments.exclude
    )
    if not queries:
        print(f"{len(paths)} images in the index {printable(file)}")
        return
    scores = search(model, processor, queries, embeds, arguments.scoring, sample)
    results = best_images(queries, paths, scores, arguments.top)
    print_results(results)
    if arguments.output:
        write_table(arguments.output, "--output", results)
    if arguments.sheet:
        draw_sheet(arguments.sheet, results)


if __name__ == "__main__":
    sys.exit(main())
