"""Publish a trained model with its card and results as a repository on the Hub.

    python eval/publish.py outputs/emoji_demo --repo_id USER/NAME --results results.json
    python eval/publish.py outputs/emoji_demo --repo_id USER/NAME --card_only model_cards/emoji_demo.md

Everything goes up in one commit, so a repository never holds half of a model; files that are there already are not sent
again. Only files that a model, its card or its training log need are published, and no absolute path in any of them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from eval.model_card import evaluation_entries, has_curves, make_card, merge_cards, read_results, tensor_shapes
from eval.models import config_hash, hash_files, weight_files
from eval.plots import training_curves
from eval.private import hide_private
from eval.report import check_writable, read_report
from eval.tasks import ROOT
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point


WEIGHTS = "model.safetensors"
REQUIRED_PARTS = {"vision_model", "text_model", "logit_scale"}
FURTHER_PARTS = {"visual_projection", "text_projection", "logit_bias", "amortizer"}
"""First parts of the names of a model's weights."""
TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "encoder.json", "bpe.codes", "dict.txt", "normalizer.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("source.spm", "target.spm", "spm_char.model", "vocab-src.json", "vocab-tgt.json", "target_vocab.json"),
)
LOG_FILES = ("metrics.jsonl", "eval.jsonl")
CONFIG_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "image_processor_config.json"),
    *("processor_config.json", "tokenizer_config.json"),
)
"""JSON files in which Transformers may note the local path that something was loaded from."""


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
    """Upload a folder that `save_pretrained` or the trainer wrote, and return the commit's address.

    Sections that were added to the card on the Hub stay.

    Args:
        folder: Folder of the finished model.
        repo_id: USER/NAME or ORGANIZATION/NAME.
        results: File that eval/run.py wrote on this very model; defaults to the last line of the folder's eval.jsonl.
        private: Make a new repository private.
        revision: Branch to commit to, created if it does not exist.
        create_pr: Open a pull request instead of committing.
        message: Commit message.
        token: Token for the Hub; defaults to the one of `hf auth login` or HF_TOKEN.

    Raises:
        UserError: The folder holds no AmorLIP model, the results are another model's, or the Hub refuses or cannot be
            reached. Nothing is half published then.
    """
    check_repo_id(repo_id)
    files = collect_files(folder, results)
    card_results = read_results(folder, results)
    card = str(make_card(folder, repo_id, card_results))
    if entries := evaluation_entries(card_results):
        files[".eval_results/amorlip.yaml"] = yaml.safe_dump(entries, sort_keys=False).encode()
    api = HfApi(token=token)
    try:
        _create_repository(api, repo_id, private, revision)
        if old := _read_card(repo_id, revision, token):
            card = merge_cards(card, old)
        files["README.md"] = card.encode()
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except UserError:
        raise
    except Exception as error:  # the client and what lies under it raise many types
        raise UserError(_explain(error, repo_id)) from error
    return commit.pr_url or commit.commit_url


def _create_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Create a repository and its branch where they do not exist; an existing one keeps its visibility."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(f"--private: {repo_id} exists and is public; make it private on the Hub, or name another.")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def check_repo_id(repo_id: str) -> None:
    """Raise `UserError` for a name that is not NAMESPACE/NAME, before anything is created."""
    try:
        validate_repo_id(repo_id)
        reason = "" if repo_id.count("/") == 1 else "its namespace is missing"
    except HFValidationError as error:
        reason = str(error).strip().splitlines()[0]
    if reason:
        raise UserError(f"The repository {repo_id!r} must be USER/NAME or ORGANIZATION/NAME: {reason}.")


def collect_files(folder: Path, results: Path | None) -> dict[str, str | bytes]:
    """Return {name in the repository: path or content} of all files to publish but the card.

    Raises:
        UserError: The folder holds no AmorLIP model, or the results are another model's.
    """
    _check_model(folder)
    if results is not None:
        _check_results(folder, results)
    weights = weight_files(folder)
    index = [] if weights == [folder / WEIGHTS] else [folder / f"{WEIGHTS}.index.json"]
    code = [folder / path.name for path in sorted((ROOT / "modeling_amorlip").glob("*_amorlip.py"))]
    paths = [*weights, *index, *code, *(folder / name for name in TOKENIZER_FILES)]
    files: dict[str, str | bytes] = {path.name: str(path) for path in paths if path.is_file()}
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            files[name] = _hide_in_json((folder / name).read_text(encoding="utf-8"))
    for name in LOG_FILES:
        if (folder / name).is_file():
            files[name] = _hide_in_lines(folder / name)
    if has_curves(folder):
        files["training_curves.png"] = _draw_curves(folder / "metrics.jsonl")
    if (folder / "run_config.yaml").is_file():
        config = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))
        files["run_config.yaml"] = yaml.safe_dump(hide_private(config), sort_keys=False).encode()
    if results is not None:
        files["results.json"] = _hide_in_json(results.read_text(encoding="utf-8"))
    files["LICENSE"] = str(ROOT / "LICENSE")
    return files


def _draw_curves(log: Path) -> bytes:
    """Return a picture that is made from a log alone, whatever the one in the folder shows."""
    picture = io.BytesIO()
    training_curves({"": log}, picture)
    return picture.getvalue()


def _hide_in_json(text: str) -> bytes:
    content = json.loads(text)
    hidden = hide_private(content)
    # Files without paths go up byte for byte, as the model's folder has them.
    return text.encode() if hidden == content else (json.dumps(hidden, indent=2) + "\n").encode()


def _hide_in_lines(file: Path) -> bytes:
    text = file.read_text(encoding="utf-8")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be cut off
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); mend or remove it.") from None
    return "".join(json.dumps(hide_private(line)) + "\n" for line in lines).encode()


def _check_model(folder: Path) -> None:
    files = weight_files(folder)
    if not (folder / "config.json").is_file() or not files or not all(path.is_file() for path in files):
        raise UserError(f"{folder} holds no model (config.json and {WEIGHTS}): name a finished run's folder.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "amorlip" or "projection_dim" not in config or "vision_config" not in config:
        raise UserError(
            f"{folder} holds a model of type {config.get('model_type')}; only AmorLIP dual encoders are published. "
            "Convert a CLIP or SigLIP with python -m modeling_amorlip.convert_clip_to_amorlip first."
        )
    if files[0].suffix != ".safetensors":
        raise UserError(f"{files[0]} is a pickle, which others should not load: save the model as {WEIGHTS}.")
    names = {name.split(".")[0] for name in tensor_shapes(folder)}
    if others := sorted(names - REQUIRED_PARTS - FURTHER_PARTS):
        raise UserError(f"{folder}: {WEIGHTS} holds {others[0]}, which is no part of a model: save the model again.")
    if missing := sorted(REQUIRED_PARTS - names):
        raise UserError(f"{folder} holds no dual encoder: {WEIGHTS} lacks {missing[0]}; name an AmorLIPModel's folder.")


def _check_results(folder: Path, results: Path) -> None:
    model, weights = read_report(results).model, hash_files(weight_files(folder))
    is_other = model.weights != weights and (model.weights or model.revision != weights[:12])
    if is_other or (model.config and model.config != config_hash(str(folder))):
        raise UserError(
            f"--results {results} are results of other weights, or of another config.json, ({model.name}) than those "
            f"in {folder}: evaluate this model with eval/run.py, and name its results."
        )


def _read_card(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """Return the card that is on the Hub, None if there is none."""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def _explain(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if type(error).__name__ == "OfflineModeIsEnabled":
        advice = "HF_HUB_OFFLINE is set: unset it"
    else:
        advice = {
            400: "the Hub refuses its content",
            401: "the token is missing or wrong: run `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write to {repo_id}: use one with write access, or another name",
            404: "there is no such repository or branch, or the token may not see it",
        }.get(status, "the Hub could not be reached or broke off; nothing is half published, run the command again")
    return f"{repo_id} was not published: {advice} ({reason})."


@cli_entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="Folder of a finished model.")
    add("--repo_id", required=True, help="Repository to publish to: USER/NAME or ORGANIZATION/NAME.")
    add("--results", type=Path, help="results.json of eval/run.py on this model (default: the folder's eval.jsonl).")
    add("--private", action="store_true", help="Make a new repository private.")
    add("--revision", help="Branch to commit to, created if it does not exist (default: main).")
    add("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    add("--message", default="Model, card and results", help="Commit message (default: %(default)s).")
    add("--card_only", type=Path, metavar="FILE", help="Write the card to a file and send nothing.")
    arguments = parser.parse_args()
    if arguments.card_only:
        check_writable("--card_only", arguments.card_only)
        collect_files(arguments.folder, arguments.results)
        card = make_card(arguments.folder, arguments.repo_id, read_results(arguments.folder, arguments.results))
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
