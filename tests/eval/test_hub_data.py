"""Tasks' data straight from the Hub, and repositories with hostile names."""

import re

import pytest

import eval.run
from eval.data import HUB, find_data
from eval.models import identify_model, load_model, revision
from eval.report import read_report
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.hub_server import Repository
from tests.helpers.models import save_model
from tests.helpers.tasks import run_main, write_classification


def upload(hub, name, folder):
    """Put a folder into the hub as a repository of its own."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories.setdefault(name, Repository(private=False))
    hub.repositories[name].branches["main"] = hub.repositories[name].add(files, "data")


def test_task_is_read_straight_from_the_hub(hub, demo_rows, tmp_path, monkeypatch):
    pictures = [row["image"] for row in demo_rows.select(range(10))]
    write_classification(tmp_path / "wds_pets", pictures, [i % 3 for i in range(10)], ["heart", "star", "cat"])
    upload(hub, "user/wds_pets", tmp_path / "wds_pets")
    (tmp_path / "task.yaml").write_text("pets: {repositories: [user/absent, user/wds_pets], size: 10}")
    model, results = save_model(tmp_path / "model"), []
    for folder in ("hub", tmp_path):
        output = tmp_path / f"{len(results)}.json"
        command = ["--tasks", tmp_path / "task.yaml", "--data_dir", folder, "--output", output, "--bootstrap", "10"]
        assert run_main(monkeypatch, eval.run, "--model", model, *command) == 0
        results.append(read_report(output).tasks["pets"])
    results[0].identity.pop("data", None), results[1].identity.pop("data", None)
    assert results[0] == results[1]
    assert results[0].status == "complete" and results[0].hub_dataset == "user/wds_pets"


def test_model_on_the_hub_is_known_by_its_commit_and_weights(hub, tmp_path):
    record = {}
    for seed in (0, 1):
        upload(hub, "user/model", save_model(tmp_path / f"model{seed}", seed))
        model, processor = load_model("user/model")
        record[seed] = identify_model("user/model", model, processor)
        commit = hub.repositories["user/model"].branches["main"]
        assert record[seed].revision == revision("user/model", model) == commit
        folder = tmp_path / f"model{seed}"
        assert record[seed].weights == identify_model(str(folder), *load_model(str(folder))).weights
    assert record[0].weights != record[1].weights and record[0].tokenizer == record[1].tokenizer
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model("user/model", revision="absent")


def test_repository_that_cannot_be_read_is_named(hub):
    with pytest.raises(UserError, match="user/absent cannot be read from the Hub"):
        find_data(Task("pets", repositories=("user/absent",)), HUB)


def test_names_that_lead_out_of_the_folder_are_refused(hub, tmp_path, monkeypatch, capsys):
    outside = tmp_path / "evil_absolute.txt"
    traps = {"djghosh/wds_cifar10_test": "test/../../../evil.txt", "clip-benchmark/wds_cifar10": str(outside)}
    for repository, name in traps.items():
        hub.repositories[repository] = Repository(private=False)
        hub.repositories[repository].branches["main"] = hub.repositories[repository].add({name: b"evil"}, "a trap")
    assert run_main(monkeypatch, eval.run, "--download", "cifar10", "--data_dir", tmp_path / "a/b/data") == 1
    error = capsys.readouterr().err
    assert len(re.findall(r"cannot be downloaded: Invalid filename '.*evil", error)) == 2, error
    assert not list(tmp_path.rglob("*evil*"))
