"""Train objectives with whole and with sharded models, and save how far apart they end. Run by test_sharding.py:

torchrun --standalone --nproc_per_node 2 tests/helpers/sharded_layouts.py OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator

from tests.helpers.layouts import CASES, N, train
from training.run.sharding import ShardingSettings


FEW = [("siglip", {}, {}), ("amorlip", {"recent_pairs": 24}, {})]
"""Cases that CI tries; the slow test tries all."""


def compare(accelerator: Accelerator, cases: list[tuple], settings: dict[str, ShardingSettings]) -> dict[str, dict]:
    """Train every case whole and sharded; return the largest error and each process's share of the bytes."""
    processes, report = accelerator.num_processes, {}
    for case in cases:
        for micro_batch_size in (0, 3 if N // processes > 3 else 1):
            expected, whole_bytes = train(accelerator, *case, micro_batch_size)
            for name, sharding in settings.items():
                result, local_bytes = train(accelerator, *case, micro_batch_size, sharding=sharding)
                share = local_bytes / (whole_bytes / (processes // sharding.replicas))
                shares = accelerator.gather(torch.tensor([share])).tolist()
                error = largest_error(result, expected)
                report[f"{case} micro {micro_batch_size} {name}"] = {"error": error, "shares": shares}
    return report


def largest_error(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of a tensor, relative to its size plus 1e-3."""
    assert result.keys() == expected.keys()
    errors = []
    for name, value in expected.items():
        seen = value.isfinite()
        assert torch.equal(seen, result[name].isfinite()), name
        difference = (result[name] - value)[seen].double().norm()
        errors.append(float(difference / (value[seen].double().norm() + 1e-3)))
    return max(errors)


def main(output: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    report = compare(accelerator, CASES, {"usual": ShardingSettings()})
    settings = {
        "gathered once": ShardingSettings(reshard_after_forward=False),
        "named layers": ShardingSettings(layer_classes=("CLIPEncoderLayer",)),
    }
    if accelerator.num_processes == 4:
        settings["hybrid"] = ShardingSettings(replicas=2)
    report |= compare(accelerator, FEW, settings)
    if accelerator.is_main_process:
        torch.save(report, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
