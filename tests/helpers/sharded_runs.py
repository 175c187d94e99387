"""Train a recipe with a sharded model, stop it, continue it and compare. Run by test_sharding.py:

torchrun --standalone --nproc_per_node 2 tests/helpers/sharded_runs.py RECIPE FOLDER [--field value ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

from tests.helpers.runs import assert_same_weights, build, read_metrics, train, train_until_killed
from tests.helpers.sharded_layouts import FEW, compare
from training.run.sharded_state import is_sharded
from training.run.sharding import ShardingSettings


RESUME = "--resume_from_checkpoint"


def shard() -> None:
    """Ask for FSDP2 as `accelerate launch` does; a run takes the setting out of the environment."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")


def assert_close(ours: Path, theirs: Path, steps: list[int]) -> None:
    """Assert that two runs log the same metrics, but for rounding."""
    lines = {line["step"]: line for line in read_metrics(theirs)}
    assert [line["step"] for line in read_metrics(ours)] == steps
    for line in read_metrics(ours):
        for name, value in lines[line["step"]].items():
            assert abs(line[name] - value) <= 1e-4 * abs(value) + 1e-5, (name, line[name], value)


def main(recipe: Path, folder: Path, *options: str) -> None:
    PartialState.destroy_process_group = lambda self, group=None: None  # the end of a run is not the end of this script
    compared = compare(Accelerator(cpu=True), FEW, {"usual": ShardingSettings()})
    whole, stopped, unsharded = folder / "whole", folder / "stopped", folder / "unsharded"
    shard()
    trainer = train(recipe, "--output_dir", whole, *options)
    assert any(hasattr(parameter, "to_local") for parameter in trainer.model.parameters())
    shard()
    train_until_killed(recipe, 4, "--output_dir", stopped, *options)
    assert is_sharded(stopped / "checkpoints/step_00000002")
    shard()
    train(recipe, "--output_dir", stopped, RESUME, "latest", *options)
    # Its checkpoint is continued without FSDP2, and that run's checkpoint with FSDP2.
    build(recipe, "--output_dir", unsharded, RESUME, whole / "checkpoints/step_00000002", *options).train()
    shard()
    again = ("--output_dir", folder / "again", "--max_steps", 5)
    build(recipe, *again, RESUME, unsharded / "checkpoints/step_00000004", *options).train()
    if dist.get_rank() == 0:
        assert read_metrics(stopped) == read_metrics(whole)
        for part in ("", "ema") if (whole / "ema").is_dir() else ("",):
            assert_same_weights(stopped / part, whole / part)
        assert_close(unsharded, whole, [3, 4])
        assert [line["step"] for line in read_metrics(folder / "again")] == [5]
        torch.save(compared, folder / "compared.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
