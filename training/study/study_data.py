"""Split a table of pictograms by style into a training set and image-classification sets of unseen styles.

    python training/study/study_data.py DATA/pictograms_train.parquet DATA --reported noto-v1 emojione-v1 \\
        --trained twemoji noto

DATA receives study_train.parquet with the pairs of the `--trained` styles (default: all others), and for each reported
style a set STYLE.parquet whose classes are its captions. STYLE+STYLE makes one set of both styles.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets

from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


def select_styles(pairs: datasets.Dataset, styles: set[str]) -> datasets.Dataset:
    """Return the pairs of the given styles, in their order."""
    return pairs.select([i for i, style in enumerate(pairs["style"]) if style in styles])


def as_classification(pairs: datasets.Dataset) -> datasets.Dataset:
    """Return images with labels whose classes are the captions, in alphabetical order."""
    images = pairs.select_columns(["image", "caption"]).rename_column("caption", "label")
    return images.cast_column("label", datasets.ClassLabel(names=sorted(set(images["label"]))))


def split(pairs: datasets.Dataset, reported: list[str], trained: list[str] | None, output_dir: Path) -> None:
    """Write the training set and one classification set per reported style.

    Raises:
        UserError: a style does not exist.
    """
    styles = set(pairs["style"])
    groups = {name: set(name.split("+")) for name in reported}
    held_out = set().union(*groups.values())
    kept = set(trained or styles) - held_out
    if unknown := (kept | held_out) - styles:
        raise UserError(f"No pair has the style {', '.join(sorted(unknown))}; choose from {', '.join(sorted(styles))}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    train = select_styles(pairs, kept)
    train.to_parquet(output_dir / "study_train.parquet")
    print(f"study_train.parquet: {len(train)} pairs")
    for name, members in groups.items():
        images = as_classification(select_styles(pairs, members))
        images.to_parquet(output_dir / f"{name}.parquet")
        print(f"{name}.parquet: {len(images)} images of {images.features['label'].num_classes} classes")


@cli_entry_point
def main() -> None:
    """Split the pictograms as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictograms", type=Path, help="parquet file with the columns image, caption and style")
    parser.add_argument("output_dir", type=Path, help="folder for the parquet files")
    parser.add_argument("--reported", nargs="+", required=True, metavar="STYLE", help="styles kept out of training")
    parser.add_argument("--trained", nargs="+", metavar="STYLE", help="styles to train on (default: all others)")
    arguments = parser.parse_args()
    if not arguments.pictograms.is_file():
        raise UserError(f"There is no file {arguments.pictograms}.")
    pairs = datasets.load_dataset("parquet", data_files=str(arguments.pictograms), split="train")
    split(pairs, arguments.reported, arguments.trained, arguments.output_dir)


if __name__ == "__main__":
    sys.exit(main())
