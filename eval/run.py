"""Evaluates a model on tasks.

python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji --output results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, without installation

import torch  # noqa: E402

from eval.encode import encode_images  # noqa: E402
from eval.errors import UserError  # noqa: E402
from eval.pixel_baseline import pixel_baseline_accuracy  # noqa: E402
from eval.plots import contact_sheet  # noqa: E402
from eval.retrieval import retrieval_metrics  # noqa: E402
from eval.tasks import ROOT, Task, load_parquet, load_task, load_texts  # noqa: E402
from eval.zero_shot import build_classifier, top_classes, zero_shot_metrics  # noqa: E402


SCHEMA_VERSION = 1


def evaluate(model, processor, task: Task, data_dir: Path = ROOT, batch_size: int = 256, sheet: Path | None = None):
    """Results of one task: [{"task", "metric", "value" (a fraction), "num_samples"}, ...].

    Zero-shot accuracy over all class names, retrieval between images and names in both directions, and the accuracy of
    the pixel-nearest-neighbour baseline. `sheet` is where to draw 24 images with their best captions.
    """
    rows = load_parquet(task.data, data_dir)
    classes, templates = load_texts(task.texts, data_dir)
    labels = torch.tensor(rows["label"])
    if len(labels) == 0 or labels.max() >= len(classes):
        raise UserError(f"Task {task.name}: {len(labels)} images and {len(classes)} class names do not fit together.")
    image_embeds = encode_images(model, processor, (row["image"] for row in rows), batch_size)
    classifier = build_classifier(model, processor, classes, templates, batch_size)
    metrics = zero_shot_metrics(image_embeds, classifier, labels)
    present = labels.unique()
    metrics |= retrieval_metrics(image_embeds, classifier[present], labels, present)
    if task.pixel_reference:
        reference = load_parquet(task.pixel_reference, data_dir)
        names = [classes[label] for label in labels.tolist()]
        metrics["pixel_baseline_acc1"] = pixel_baseline_accuracy(
            (row["image"] for row in rows), names, (row["image"] for row in reference), reference["caption"]
        )
    if sheet is not None:
        chosen = torch.linspace(0, len(rows) - 1, min(24, len(rows))).long().tolist()
        best = top_classes(image_embeds[chosen], classifier, 5).tolist()
        contact_sheet(
            [rows[i]["image"].convert("RGB") for i in chosen],
            [classes[labels[i]] for i in chosen],
            [[classes[c] for c in row] for row in best],
            sheet,
        )
    return [
        {"task": task.name, "metric": metric, "value": value, "num_samples": len(labels)}
        for metric, value in metrics.items()
    ]


def print_table(results: list[dict]) -> None:
    """Results as a table, in per cent."""
    print(f"{'task':<20} {'metric':<28} {'value %':>8} {'samples':>8}")
    for result in results:
        print(f"{result['task']:<20} {result['metric']:<28} {100 * result['value']:8.2f} {result['num_samples']:8d}")


def load_model(name: str):
    """(model, processor) of a folder or repository; raises `UserError` when they cannot be loaded."""
    from transformers import AutoModel, AutoProcessor

    import modeling_amorlip  # noqa: F401  registers AmorLIP

    if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder.")
    try:
        return AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name} cannot be loaded: {reason}") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--tasks", required=True, nargs="+", help="names in eval/tasks.yaml, or YAML files like it")
    parser.add_argument("--data_dir", type=Path, default=ROOT, help="folder that the tasks' paths start from")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--contact_sheet", type=Path, help="PNG of images with their five best captions to draw")
    parser.add_argument("--batch_size", type=int, default=256, help="images or texts encoded at a time")
    arguments = parser.parse_args()
    try:
        tasks = [load_task(name) for name in arguments.tasks]
        model, processor = load_model(arguments.model)
        results = []
        for task in tasks:
            results += evaluate(
                model, processor, task, arguments.data_dir, arguments.batch_size, arguments.contact_sheet
            )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(results)
    if arguments.output:
        report = {"schema_version": SCHEMA_VERSION, "model": arguments.model, "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
