"""Measure the time of a whole training step by objective, with ViT-B/32 or other encoders on real pairs.

    python training/benchmarks/step.py --objectives clip amorlip --batch_size 128 --output outputs/step_cpu.json
    python training/benchmarks/step.py --objectives clip clip+compile --batch_size 32 --output outputs/step_compile.json

Training runs of the objectives take turns. Each run makes one step that is not counted and then `--steps` that are. The
report holds medians and means over all counted steps, with ratios to the first objective: heads that are fitted every
eighth step show in the mean only. `+compile` after an objective's name compiles the encoders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).resolve().parents[2]
RECIPE = {  # the defaults of Transformers' configurations are CLIP's ViT-B/32
    "train_data": "demo_data/emoji/train.parquet",
    "vision_config": {"model_type": "clip_vision_model"},
    "text_config": {"model_type": "clip_text_model"},
    "log_every": 1,
    "checkpoint_every": 10**9,
}


def recipe_of(name: str, output_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of one run of an objective."""
    objective, compiled, _ = name.partition("+compile")
    values: dict[str, Any] = {
        **RECIPE,
        "objective": objective,
        "output_dir": str(output_dir),
        "max_steps": arguments.steps + 1,
        "per_device_train_batch_size": arguments.batch_size,
        "compile": bool(compiled),
    }
    if objective == "amorlip":
        values["objective_args"] = {"online_every": arguments.online_every}
    return values | json.loads(arguments.overrides)


def seconds_per_step(objective: str, arguments: argparse.Namespace) -> list[float]:
    """Return the seconds of each counted step of one run in a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(objective, folder / "run", arguments)))
        command = [sys.executable, "training/pretrain.py", "--config", str(recipe)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"The run with objective {objective} failed:\n{result.stderr}")
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()[1:]
        return [arguments.batch_size / json.loads(line)["samples_per_second"] for line in lines]


def summarize(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row per objective, and print them."""
    results: list[dict[str, Any]] = []
    print(f"{'objective':<16} {'median s':>9} {'ratio':>7} {'mean s':>9} {'ratio':>7}")
    for objective, values in seconds.items():
        row: dict[str, Any] = {
            "objective": objective,
            "median": statistics.median(values),
            "mean": statistics.mean(values),
        }
        first = results[0] if results else row
        row |= {"ratio": row["median"] / first["median"], "mean_ratio": row["mean"] / first["mean"]}
        results.append(row)
        print(f"{objective:<16} {row['median']:9.3f} {row['ratio']:7.3f} {row['mean']:9.3f} {row['mean_ratio']:7.3f}")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--objectives", nargs="+", default=["clip", "amorlip"], help="with or without +compile (default: clip amorlip)"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per step (default: 128)")
    parser.add_argument("--steps", type=int, default=8, help="counted steps per run (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per objective (default: 3)")
    parser.add_argument(
        "--online_every", type=int, default=8, help="steps between fits of AmorLIP's heads, T_online (default: 8)"
    )
    parser.add_argument("--overrides", default="{}", help="JSON object of recipe fields to replace (default: none)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Time all objectives, print a table and write the report."""
    arguments = parse_arguments()
    seconds: dict[str, list[float]] = {objective: [] for objective in arguments.objectives}
    for _ in range(arguments.rounds):
        for objective, values in seconds.items():
            values += seconds_per_step(objective, arguments)
    results = summarize(seconds)
    if arguments.output:
        about = {"command": " ".join(sys.argv), "batch_size": arguments.batch_size}
        arguments.output.write_text(json.dumps({**about, "results": results, "seconds": seconds}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
