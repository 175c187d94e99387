"""Trains AmorLIP (or a rival objective) from a recipe.

    accelerate launch training/pretrain.py --config training/recipes/emoji_demo.yaml     # ten minutes on two CPU cores
    accelerate launch --num_processes 8 training/pretrain.py --config RECIPE.yaml --train_data DATA
    accelerate launch training/pretrain.py --config RECIPE.yaml --resume_from_checkpoint latest

`--help` lists every field.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_amorlip.cli_amorlip import cli_entry_point
from training.config import parse_config


@cli_entry_point
def main() -> None:
    config = parse_config(sys.argv[1:])
    from training.build import build_trainer  # late, so that --help and mistyped fields need not wait for torch

    build_trainer(config).train()


if __name__ == "__main__":
    sys.exit(main())
