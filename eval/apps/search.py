"""Searches a folder of images in words.

    python eval/apps/search.py --model outputs/emoji_demo --images pictures "a red heart" "a cat" --sheet found.png

Embeddings are kept in an index beside the folder, or in --index FILE, so that the next search encodes only what is new
or changed. --scoring gallery and amortized take off each image's cosine what it would score with any query (its
log-partition), so that pictures which look like everything no longer come first everywhere. gallery computes it over
the queries given, or over typical ones in a file, --queries FILE: the more and the more typical, the better.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.apps.image_files import encode_files, find_images, read_lines
from eval.models import load_model, revision
from eval.plots import contact_sheet
from eval.scoring import SCORINGS, log_partition_corrections, require_amortizer
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_texts
from modeling_amorlip.images_amorlip import open_image


FORMAT = "amorlip_image_index"
SAVE_EVERY = 4096  # images; an interrupted run goes on from there


def index_images(
    model, processor, folder: Path, file: Path, model_revision: str | None, batch_size: int = 32
) -> tuple[list[Path], Tensor]:
    """(paths, unit-norm embeddings [I, d]) of a folder's images; encodes what `file` does not hold yet, and updates it.

    An entry holds as long as path, size and modification time are the same, all of them with model and image processor.

    Raises:
        UserError: there is no image that can be read, or `file` is something else than an index.
    """
    made_by = {"revision": str(model_revision), "image_processor": processor.image_processor.to_json_string()}
    stamps = {path: _stamp(folder, path) for path in find_images(folder)}
    known = _read_index(file, made_by) if model_revision else {}
    embeds = {path: known[stamp] for path, stamp in stamps.items() if stamp in known}
    new = [path for path in stamps if path not in embeds]
    print(f"{len(embeds)} images in the index, {len(new)} to encode", file=sys.stderr)
    for start in range(0, len(new), SAVE_EVERY):
        embeds |= encode_files(model, processor, new[start : start + SAVE_EVERY], batch_size)
        _write_index(file, made_by, {stamps[path]: embed for path, embed in embeds.items()})
    if not embeds:
        raise UserError(f"None of the {len(stamps)} images in {folder} can be read.")
    paths = sorted(embeds)
    return paths, torch.stack([embeds[path] for path in paths])


def search(
    model, processor, queries: list[str], image_embeds: Tensor, scoring: str = "cosine", sample: list[str] | None = None
) -> Tensor:
    """Scores [Q, I] of images [I, d] for each query, in units of the cosine.

    Args:
        scoring: `cosine`; `gallery` subtracts log sum_t exp(logit(t, image)) / logit_scale over texts t of `sample`,
            `amortized` what the model's image head says of it. A constant that all images share does not matter.
        sample: texts that stand for what is asked for at all; the queries themselves by default. A query is not
            compared with itself: p and p / (1 - p) rank alike, but float32 cannot tell apart what is next to p = 1.
    """
    texts = encode_texts(model, processor, queries)
    scores = texts @ image_embeds.T
    if scoring != "gallery":
        penalty = log_partition_corrections(model, (scoring,), texts, image_embeds, "image")[scoring]
        return scores if penalty is None else scores - penalty
    sample = queries if sample is None else sample
    gallery = encode_texts(model, processor, sample)
    for row, query in zip(scores, queries, strict=True):
        others = gallery[[text != query for text in sample]]
        row -= log_partition_corrections(model, (scoring,), others, image_embeds, "image")[scoring]
    return scores


def check_scoring(model, scoring: str, sample: list[str]) -> None:
    """Raises `UserError` when images cannot be scored so: by a model without heads, or with no other query."""
    require_amortizer(model, (scoring,))
    if scoring == "gallery" and len(set(sample)) < 2:
        raise UserError(
            "--scoring gallery compares with other queries, and there is only one: "
            "ask several at once, or name a file of queries, one a line, with --queries."
        )


def draw(path: Path, queries: list[str], found: list[list[tuple[float, Path]]]) -> None:
    """A contact sheet: under each query its images, best first, with score and name."""
    images, captions, headings = [], [], {}
    for query, results in zip(queries, found, strict=True):
        headings[len(images)] = query
        for score, file in results:
            images.append(open_image(file))
            images[-1].thumbnail((256, 256))
            captions.append([f"{score:.3f}", file.name])
        while len(images) % 6:  # the next query starts a row
            images.append(None)
            captions.append([])
    contact_sheet(images, [""] * len(images), captions, path, headings)


def _stamp(folder: Path, path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return path.relative_to(folder).as_posix(), about.st_size, about.st_mtime_ns


def _read_index(file: Path, made_by: dict[str, str]) -> dict[tuple[str, int, int], Tensor]:
    """{(path, size, mtime): embedding [d]}, empty where there is no index or another model made it."""
    if not file.exists():
        return {}
    try:
        with safe_open(file, "pt") as index:
            about = index.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(f"{file} is not an index of images; name another file with --index.")
            if any(about.get(key) != value for key, value in made_by.items()):
                print(f"{file} is another model's; encoding anew", file=sys.stderr)
                return {}
            return dict(zip(map(tuple, json.loads(about["images"])), index.get_tensor("image_embeds"), strict=True))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete it, or name another with --index.") from None


def _write_index(file: Path, made_by: dict[str, str], entries: dict[tuple[str, int, int], Tensor]) -> None:
    if not entries:
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, **made_by, "images": json.dumps(list(entries))}
        save_file({"image_embeds": torch.stack(list(entries.values()))}, aside, metadata=about)
        os.replace(aside, file)
    except OSError as error:
        raise UserError(f"The index {file} cannot be written ({error}); name another place with --index.") from None


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="+", help="what to look for, in words")
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched with its subfolders")
    parser.add_argument("--index", type=Path, help="file of embeddings; default FOLDER.index.safetensors")
    parser.add_argument("--top", type=int, default=12, help="images to show for each query")
    parser.add_argument("--scoring", choices=SCORINGS, default="cosine", help="how images are ranked, see above")
    parser.add_argument("--queries", type=Path, help="texts that stand for all queries, one a line, for gallery")
    parser.add_argument("--sheet", type=Path, help="PNG of the images found to draw")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at a time")
    arguments = parser.parse_args()
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch_size must be 1 or more.")
    if arguments.queries and arguments.scoring != "gallery":
        raise UserError("--queries is for --scoring gallery alone.")
    if not arguments.images.is_dir():
        raise UserError(f"--images {arguments.images}: there is no such folder.")
    sample = read_lines(arguments.queries) if arguments.queries else None
    folder = arguments.images.resolve()
    file = arguments.index or folder.parent / f"{folder.name}.index.safetensors"
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_scoring(model, arguments.scoring, arguments.query if sample is None else sample)
    identity = revision(arguments.model, model)
    paths, embeds = index_images(model, processor, arguments.images, file, identity, arguments.batch_size)
    scores, best = search(model, processor, arguments.query, embeds, arguments.scoring, sample).topk(
        min(arguments.top, len(paths))
    )
    found = [
        [(score, paths[i]) for score, i in zip(*row, strict=True)]
        for row in zip(scores.tolist(), best.tolist(), strict=True)
    ]
    for query, results in zip(arguments.query, found, strict=True):
        print(query)
        for rank, (score, path) in enumerate(results, 1):
            print(f"{rank:4d}  {score:7.4f}  {path}")
    if arguments.sheet:
        draw(arguments.sheet, arguments.query, found)


if __name__ == "__main__":
    sys.exit(main())
