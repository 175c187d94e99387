"""Publishes a trained model with its card and results as a repository of the Hub.

    python eval/publish.py outputs/emoji_demo --repo_id USER/NAME --results results.json
    python eval/publish.py outputs/emoji_demo --repo_id USER/NAME --card_only model_cards/emoji_demo.md

Everything goes up in one commit, so a repository never holds half of it; what is there already is not sent again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from eval.tasks import ROOT, known_tasks
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


PATTERNS = ("*.safetensors", "*.json", "*.jsonl", "*.py", "*.txt", "*.yaml", "*.png", "*.csv")
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


@dataclass
class Row:
    """One line of the card's table; `value` is a fraction."""

    task: str
    title: str
    dataset: str
    split: str
    metric: str
    value: float
    ci95: list[float] | None
    num_samples: int

    @property
    def task_type(self) -> str:
        return "image-text-retrieval" if "recall@" in self.metric else "zero-shot-image-classification"


def publish(
    folder: Path,
    repo_id: str,
    results: Path | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Model, card and results",
    token: str | None = None,
) -> str:
    """Uploads a folder that `save_pretrained` or the trainer wrote; returns the commit's address.

    Args:
        results: what eval/run.py wrote; without it, the last line of the folder's eval.jsonl.
        private: of a repository that is made anew. revision: branch, made if need be. create_pr: propose only.
        token: of the Hub, else the one of `hf auth login` or HF_TOKEN.

    Raises:
        UserError: the folder holds no model, the Hub refuses or cannot be reached. Nothing is half published then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    files = _files(folder, results)
    rows, aggregates = read_results(folder, results)
    card = make_card(folder, repo_id, rows, aggregates)
    files["README.md"] = str(card).encode()
    if entries := _evaluation_entries(rows):
        files[".eval_results/amorlip.yaml"] = yaml.safe_dump(entries, sort_keys=False).encode()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        ModelCard(str(card)).validate()
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except Exception as error:  # the client and what lies under it raise many kinds
        raise UserError(_explain(error, repo_id)) from error
    return commit.pr_url or commit.commit_url


def read_results(folder: Path, results: Path | None) -> tuple[list[Row], list[tuple[str, str]]]:
    """(main metrics of evaluated tasks, aggregates as text) of a results.json, else of the folder's eval.jsonl."""
    if results is None:
        log = folder / "eval.jsonl"
        if not log.is_file() or not (lines := log.read_text(encoding="utf-8").splitlines()):
            return [], []
        known, rows = known_tasks(), []
        for result in json.loads(lines[-1])["results"]:
            task = known.get(result["task"])
            if result["metric"] in ("acc1", "acc5", task and task.main_metric):
                title, data = (task.title, task.data or task.repositories[0]) if task else (result["task"],) * 2
                row = Row(
                    result["task"],
                    title,
                    data,
                    "test",
                    result["metric"],
                    float(result["value"]),
                    None,
                    int(result["num_samples"]),
                )
                rows.append(row)
        return rows, []
    try:
        report = json.loads(results.read_text(encoding="utf-8"))
        rows = [
            Row(
                name,
                entry["title"],
                entry["dataset"]["name"],
                entry["dataset"]["split"],
                entry["main_metric"],
                float(entry["metrics"][entry["main_metric"]]["value"]),
                entry["metrics"][entry["main_metric"]]["ci95"],
                int(entry["num_samples"]),
            )
            for name, entry in report["tasks"].items()
            if entry["status"] == "complete"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--results {results} is not what eval/run.py writes ({error!r}).") from None
    aggregates = [
        (name, f"{100 * value['value']:.2f}" if value["complete"] else f"incomplete, {len(value['missing'])} missing")
        for name, value in report["aggregates"].items()
    ]
    return rows, aggregates


def make_card(folder: Path, repo_id: str, rows: list[Row], aggregates: list[tuple[str, str]]):
    """The model card, from `model_cards/model.md`, with results as model-index."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118  it is no dictionary
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                parameters += size
    run_config = folder / "run_config.yaml"
    arguments = yaml.safe_load(run_config.read_text(encoding="utf-8")) if run_config.is_file() else {}
    arguments = arguments.get("arguments", arguments)  # earlier versions wrote settings under a key
    settings = [(key, arguments[key]) for key in SETTINGS if arguments.get(key) not in (None, {}, "")]
    # A local path says nothing to others, and may say more than its owner wants.
    settings = [(k, Path(v).name if k == "train_data" and Path(str(v)).is_absolute() else v) for k, v in settings]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["amorlip", "clip", "contrastive-learning", "custom_code"],
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=row.task_type,
                dataset_type=row.dataset,
                dataset_name=row.title,
                dataset_split=row.split,
                metric_type=row.metric,
                metric_value=round(100 * row.value, 2),
            )
            for row in rows
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(ROOT / "model_cards/model.md"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        objective=arguments.get("objective", "amorlip"),
        parameters=f"{parameters / 1e6:.1f}",
        image_size=config["vision_config"].get("image_size", "any number of"),
        context=config["text_config"].get("max_position_embeddings", "any number of"),
        projection_dim=config["projection_dim"],
        rows=rows,
        aggregates=aggregates,
        settings=settings,
    )


def _evaluation_entries(rows: list[Row]) -> list[dict]:
    """The Hub's evaluation-results file: those results whose data set is a repository of the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    return eval_result_entries_to_yaml(
        [
            EvalResultEntry(dataset_id=row.dataset, task_id=row.metric, value=round(100 * row.value, 2))
            for row in rows
            if row.dataset.count("/") == 1 and "." not in row.dataset
        ]
    )


def _files(folder: Path, results: Path | None) -> dict[str, str | bytes]:
    """{name in the repository: path or content}; what lies in subfolders, checkpoints above all, stays here."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no model (config.json and *.safetensors): name a finished run's folder.")
    found = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
    files: dict[str, str | bytes] = {path.name: str(path) for path in found}
    files["LICENSE"] = str(ROOT / "LICENSE")
    if results is not None:
        files["results.json"] = str(results)
    if "run_config.yaml" in files:
        config = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))
        for key in ("output_dir", "train_data"):
            settings = config.get("arguments", config)
            settings[key] = Path(settings[key]).name
        files["run_config.yaml"] = yaml.safe_dump(config, sort_keys=False).encode()
    return files


def _explain(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if type(error).__name__ == "OfflineModeIsEnabled":
        advice = "HF_HUB_OFFLINE is set: unset it"
    else:
        advice = {
            401: "the token is missing or wrong: run `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write to {repo_id}: take one with write access, or another name",
            404: "there is no such repository or branch, or the token may not see it",
        }.get(status, "the Hub could not be reached or broke off; nothing is half published, the same command goes on")
    return f"{repo_id} was not published: {advice} ({reason})."


@cli_entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a finished model")
    parser.add_argument("--repo_id", required=True, help="USER/NAME or ORGANISATION/NAME")
    parser.add_argument("--results", type=Path, help="results.json of eval/run.py; else the folder's eval.jsonl")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made if need be")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", default="Model, card and results", help="of the commit")
    parser.add_argument("--card_only", type=Path, metavar="FILE", help="write the card to a file and send nothing")
    arguments = parser.parse_args()
    if arguments.card_only:
        _files(arguments.folder, arguments.results)
        card = make_card(arguments.folder, arguments.repo_id, *read_results(arguments.folder, arguments.results))
        arguments.card_only.write_text(str(card), encoding="utf-8")
        return 0
    url = publish(
        arguments.folder,
        arguments.repo_id,
        arguments.results,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        message=arguments.message,
    )
    print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
