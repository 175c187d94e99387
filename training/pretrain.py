"""Train AmorLIP, or another objective, from a recipe.

    accelerate launch training/pretrain.py --config training/recipes/emoji_demo.yaml     # six minutes on two CPU cores
    accelerate launch --num_processes 8 training/pretrain.py --config RECIPE.yaml --train_data DATA
    accelerate launch training/pretrain.py --config RECIPE.yaml --resume_from_checkpoint latest

`--help` lists every setting.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.config import parse_config, print_help_and_exit


def main() -> int:
    """Train as the command line says; return the exit status."""
    print_help_and_exit(sys.argv[1:])
    from modeling_amorlip.cli_amorlip import cli_entry_point  # late: it imports torch, which --help need not wait for

    return cli_entry_point(train)()


def train() -> None:
    config = parse_config(sys.argv[1:])
    from training.build import build_trainer  # late: mistakes in the settings need not wait for it

    build_trainer(config).train()


if __name__ == "__main__":
    sys.exit(main())
