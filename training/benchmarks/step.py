"""Time of a whole training step by objective: ViT-B/32 towers, or others, on real pairs.

python training/benchmarks/step.py --objectives clip amorlip --batch_size 128 --output eval/benchmarks/step_cpu.json

Runs of the trainer take turns, a round of all objectives after the other; each takes 1 step that is not counted and
`--steps` that are. Medians over all counted steps, and means (an amortizer that is fitted every eighth step shows in
the mean only), with ratios to the first objective.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = {  # CLIP's ViT-B/32 is what Transformers' configurations default to
    "train_data": "demo_data/emoji/train.parquet",
    "vision_config": {"model_type": "clip_vision_model"},
    "text_config": {"model_type": "clip_text_model"},
    "log_every": 1,
    "checkpoint_every": 10**9,
}


def seconds_a_step(objective: str, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each counted step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        values = {**RECIPE, "objective": objective, "output_dir": f"{folder}/run", "max_steps": arguments.steps + 1}
        values["per_device_train_batch_size"] = arguments.batch_size
        if objective == "amorlip":
            values["objective_args"] = {"online_every": arguments.online_every}
        recipe.write_text(yaml.safe_dump(values | json.loads(arguments.overrides)))
        command = [sys.executable, "training/pretrain.py", "--config", str(recipe)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"the run with {objective} failed:\n{result.stderr}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()[1:]
        return [arguments.batch_size / json.loads(line)["samples_per_second"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["clip", "amorlip"])
    parser.add_argument("--batch_size", type=int, default=128, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8, help="counted steps a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs an objective")
    parser.add_argument("--online_every", type=int, default=8, help="steps between fits of AmorLIP's heads (T_online)")
    parser.add_argument("--overrides", default="{}", help="JSON of fields of the recipe to set otherwise")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {objective: [] for objective in arguments.objectives}
    for _ in range(arguments.rounds):
        for objective, measured in seconds.items():
            measured += seconds_a_step(objective, arguments)
    results = []
    print(f"{'objective':<12} {'median s':>9} {'ratio':>7} {'mean s':>9} {'ratio':>7}")
    for objective, measured in seconds.items():
        row = {"objective": objective, "median": statistics.median(measured), "mean": statistics.mean(measured)}
        first = results[0] if results else row
        row |= {"ratio": row["median"] / first["median"], "mean_ratio": row["mean"] / first["mean"]}
        results.append(row)
        print(f"{objective:<12} {row['median']:9.3f} {row['ratio']:7.3f} {row['mean']:9.3f} {row['mean_ratio']:7.3f}")
    if arguments.output:
        about = {"command": " ".join(sys.argv), "batch_size": arguments.batch_size}
        arguments.output.write_text(json.dumps({**about, "results": results, "seconds": seconds}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
