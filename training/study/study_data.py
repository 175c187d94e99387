"""Divides a table of pictograms by style: styles to report on are taken out of the training set.

    python training/study/study_data.py pictograms_train.parquet DATA --reported noto-v1 emojione-v1 \\
        --trained twemoji noto

DATA gets study_train.parquet, the pairs of the styles `--trained` (or of all others), and for each reported style an
image-classification set STYLE.parquet, whose classes are its captions. STYLE+STYLE is one set of both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets

from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictograms", type=Path, help="parquet with columns image, caption and style")
    parser.add_argument("output_dir", type=Path, help="folder for what is written")
    parser.add_argument("--reported", nargs="+", required=True, help="styles kept out of training")
    parser.add_argument("--trained", nargs="+", help="styles to train on; all others by default")
    arguments = parser.parse_args()
    if not arguments.pictograms.is_file():
        raise UserError(f"There is no file {arguments.pictograms}.")
    pairs = datasets.load_dataset("parquet", data_files=str(arguments.pictograms), split="train")
    styles = pairs["style"]
    reported = {name: set(name.split("+")) for name in arguments.reported}
    trained = set(arguments.trained or styles) - set().union(*reported.values())
    if unknown := set().union(trained, *reported.values()) - set(styles):
        raise UserError(
            f"No pair has the style {', '.join(sorted(unknown))}; there are {', '.join(sorted(set(styles)))}."
        )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    def of(some):
        return pairs.select([i for i, style in enumerate(styles) if style in some])

    train = of(trained)
    train.to_parquet(arguments.output_dir / "study_train.parquet")
    print(f"study_train.parquet: {len(train)} pairs")
    for name, some in reported.items():
        pictures = of(some).select_columns(["image", "caption"]).rename_column("caption", "label")
        names = sorted(set(pictures["label"]))
        pictures = pictures.cast_column("label", datasets.ClassLabel(names=names))
        pictures.to_parquet(arguments.output_dir / f"{name}.parquet")
        print(f"{name}.parquet: {len(pictures)} pictures of {len(names)} classes")


if __name__ == "__main__":
    sys.exit(main())
