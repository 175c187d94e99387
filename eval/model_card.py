"""The card of a published model: from the template, with its results, and with what was written on the Hub."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors import safe_open

from eval.models import weight_files
from eval.private import hide_private
from eval.report import Report, TaskResult, read_evaluations, read_report, read_run_config
from eval.scoring import SCORING_MODES, scoring_name
from eval.tasks import ROOT


TEMPLATE = ROOT / "model_cards/model.md"
SETTINGS = (
    "objective",
    "objective_args",
    "train_data",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "negatives",
    "seed",
)
LOCAL_DATASET = "local"  # what the card's metadata says of data that is not on the Hub
PERSONAL_SECTIONS = ("Limits", "Citation")  # of the template, kept as they are on the Hub


@dataclass
class Row:
    """One line of the card's table of results, in per cent."""

    result: TaskResult
    metric: str
    scoring: str

    @property
    def mode(self) -> str:
        """ "inductive" or "transductive"."""
        return SCORING_MODES[scoring_name(self.scoring)]

    @property
    def value(self) -> float:
        """The metric in per cent, as the plain float that YAML needs."""
        return round(100 * float(self.result.scores[self.scoring][self.metric].value), 2)

    @property
    def interval(self) -> str:
        """The 95 % confidence interval in per cent, "" if there is none."""
        ci95 = self.result.scores[self.scoring][self.metric].ci95
        return f"{100 * ci95[0]:.2f} – {100 * ci95[1]:.2f}" if ci95 else ""

    @property
    def task_type(self) -> str:
        """The Hub's name of the task."""
        return "image-text-retrieval" if "recall@" in self.metric else "zero-shot-image-classification"


@dataclass
class CardResults:
    """Rows of the card's table, and means over groups of tasks as text."""

    rows: list[Row]
    aggregates: list[tuple[str, str]]


def read_results(folder: Path, results: Path | None) -> CardResults:
    """Return the results of complete tasks in a results.json, or else in the last line of the folder's eval.jsonl."""
    if results is not None:
        return results_of_report(read_report(results))
    log = folder / "eval.jsonl"
    evaluations = read_evaluations(log) if log.is_file() else []
    rows = [
        Row(result, metric, "cosine")
        for result in (evaluations[-1].results if evaluations else [])
        for metric in dict.fromkeys([result.main_metric, "acc1", "acc5"])
        if metric in result.metrics
    ]
    return CardResults(rows, [])


def results_of_report(report: Report) -> CardResults:
    """Return each complete task's main metric by each way of scoring, and the aggregates."""
    rows = [
        Row(result, result.main_metric, scoring)
        for result in report.tasks.values()
        if result.status == "complete"
        for scoring in result.scores
    ]
    aggregates = [
        (name, f"incomplete, {len(mean.missing)} missing" if mean.value is None else f"{100 * mean.value:.2f}")
        for name, mean in report.aggregates.items()
    ]
    return CardResults(rows, aggregates)


def make_card(folder: Path, repo_id: str, results: CardResults) -> ModelCard:
    """Return the card of a model's folder, with its results as model-index."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run_config = read_run_config(folder)
    settings = [(key, run_config[key]) for key in SETTINGS if run_config.get(key) not in (None, {}, "")]
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["amorlip", "clip", "contrastive-learning", "custom_code"],
        model_name=name,
        eval_results=[_eval_result(row) for row in results.rows if row.scoring == "cosine"] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        objective=run_config.get("objective", "amorlip"),
        parameters=f"{count_parameters(folder) / 1e6:.1f}",
        image_size=config["vision_config"].get("image_size", "any number of"),
        context=config["text_config"].get("max_position_embeddings", "any number of"),
        projection_dim=config["projection_dim"],
        rows=results.rows,
        aggregates=results.aggregates,
        settings=[(key, hide_private(value)) for key, value in settings],
        has_curves=has_curves(folder),
    )


def has_curves(folder: Path) -> bool:
    """Return whether a folder has a log of training to draw."""
    log = folder / "metrics.jsonl"
    return log.is_file() and '"loss": ' in log.read_text(encoding="utf-8").split("\n")[0]


def _eval_result(row: Row) -> EvalResult:
    return EvalResult(
        task_type=row.task_type,
        dataset_type=row.result.hub_dataset or LOCAL_DATASET,
        dataset_name=row.result.title,
        dataset_split=row.result.split,
        metric_type=row.metric,
        metric_value=row.value,
    )


def evaluation_entries(results: CardResults) -> list[dict[str, Any]]:
    """Return the Hub's evaluation-results file: results by cosine on data sets that are on the Hub."""
    return eval_result_entries_to_yaml(
        [
            EvalResultEntry(dataset_id=row.result.hub_dataset, task_id=row.metric, value=row.value)
            for row in results.rows
            if row.result.hub_dataset and row.scoring == "cosine"
        ]
    )


def count_parameters(folder: Path) -> int:
    """Return the number of values in a folder's weight files."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a folder's weight files, whose headers alone are read."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="np") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in list(weights.keys())}
    return shapes


def merge_cards(new: str, old: str) -> str:
    """Return a new card that keeps what was written into the old one on the Hub.

    Sections that the template lacks stay where they were, and so do its `PERSONAL_SECTIONS`. Metadata of the old card
    wins, except for results; tags are united.
    """
    new_data, new_sections = _split_card(new)
    old_data, old_sections = _split_card(old)
    if not old_sections:
        return new
    sections = dict(new_sections)
    previous = ""
    for title, text in old_sections.items():
        if title in PERSONAL_SECTIONS and title in sections:
            sections[title] = text
        elif title not in sections:
            sections = _insert_after(sections, previous, title, text)
        previous = title
    data = {**new_data, **old_data}
    if "tags" in new_data and "tags" in old_data:
        data["tags"] = list(dict.fromkeys([*old_data["tags"], *new_data["tags"]]))
    data.pop("model-index", None)
    if "model-index" in new_data:
        data["model-index"] = new_data["model-index"]
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{front}\n---\n" + "".join(sections.values())


def _split_card(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a card's metadata, and its text by the heading of each section; "" is what comes before the first."""
    match = re.match(r"\ufeff?---\n(.*?)\n---\n?(.*)", card, re.S)
    front, body = match.groups() if match else ("", card)
    data = yaml.safe_load(front) or {}
    parts = re.split(r"^(?=## )", body, flags=re.M)
    sections: dict[str, str] = {}
    for part in parts:
        title = part.split("\n", 1)[0].removeprefix("## ").strip() if part.startswith("## ") else ""
        sections[title] = sections.get(title, "") + part
    return data if isinstance(data, dict) else {}, sections if body.strip() else {}


def _insert_after(sections: dict[str, str], previous: str, title: str, text: str) -> dict[str, str]:
    result = {}
    for key, value in sections.items():
        result[key] = value
        if key == previous:
            result[key] = value.rstrip("\n") + "\n\n"
            result[title] = text.rstrip("\n") + "\n\n"
    return result
