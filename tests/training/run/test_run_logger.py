"""The files of a run: settings that are a recipe and are never overwritten, and logs that are valid JSON."""

import dataclasses
import json
import subprocess

import pytest
import yaml

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT
from training.config import parse_config
from training.run import run_logger
from training.run.run_logger import RunLogger, collect_versions, flat, git_revision, read_run_config


SETTINGS = {"output_dir": "out", "train_data": "data", "seed": 1, "vision_config": {"a": 1e-6}}


def refuse_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_run_config_is_a_recipe_with_versions(tmp_path):
    config = parse_config(["--output_dir", str(tmp_path), "--train_data", "no", "--vision_config.eps", "1e-6"])
    RunLogger(tmp_path).open(dataclasses.asdict(config), 0)
    assert parse_config(["--config", str(tmp_path / "run_config.yaml")]) == config
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["versions"] == collect_versions()
    assert read_run_config(tmp_path) == dataclasses.asdict(config) | {"versions": collect_versions()}


def test_resumed_run_records_changes_and_keeps_the_first_settings(tmp_path):
    RunLogger(tmp_path).open(SETTINGS, 0)
    first = (tmp_path / "run_config.yaml").read_bytes()
    RunLogger(tmp_path).open(SETTINGS, 3)
    assert not list(tmp_path.glob("run_config_resumed_*"))
    RunLogger(tmp_path).open({**SETTINGS, "max_steps": 9, "seed": 2}, 5)
    assert (tmp_path / "run_config.yaml").read_bytes() == first
    changes = yaml.safe_load((tmp_path / "run_config_resumed_00000005.yaml").read_text())
    assert changes == {"max_steps": 9, "seed": 2}


def test_settings_of_earlier_versions_are_read(tmp_path):
    document = {"arguments": SETTINGS, "versions": {"git": "abc"}}
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump(document))
    assert read_run_config(tmp_path) == SETTINGS | {"versions": {"git": "abc"}}


@pytest.mark.parametrize("content", ["a: b: c", "just text", ""])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "run_config.yaml").write_text(content)
    with pytest.raises(UserError, match="run_config.yaml is damaged"):
        read_run_config(tmp_path)


def test_lines_are_valid_json(tmp_path):
    logger = RunLogger(tmp_path)
    logger.append("metrics", {"step": 1, "loss": float("nan"), "norms": [float("inf"), 1.5], "more": {"x": -1e999}})
    (line,) = logger.lines("metrics")
    values = json.loads(line, parse_constant=refuse_constants)
    assert values == {"step": 1, "loss": None, "norms": [None, 1.5], "more": {"x": None}}


def test_opening_cuts_logs_to_the_step(tmp_path):
    logger = RunLogger(tmp_path)
    for step in range(1, 6):
        logger.append("metrics", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    logger.open(SETTINGS, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_folder_of_another_run_is_refused(tmp_path):
    first = RunLogger(tmp_path)
    first.open(SETTINGS, 0)
    with pytest.raises(UserError, match="in use by another run"):
        RunLogger(tmp_path).open(SETTINGS, 0)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir .*file/run cannot be written"):
        RunLogger(tmp_path / "file/run").open(SETTINGS, 0)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        RunLogger(tmp_path / "nowhere").append("metrics", {"step": 1})


def test_runs_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    RunLogger(tmp_path / "run").open(SETTINGS, 0)
    assert read_run_config(tmp_path / "run")["versions"]["git"] == "unknown"


def test_revision_is_that_of_the_checkout_only(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    assert git_revision(tmp_path) == "unknown"  # no commit yet
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    inside = tmp_path / "vendored"
    inside.mkdir()
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    assert git_revision(inside) == "unknown"
    assert run_logger.CHECKOUT == ROOT


def test_flat_settings_for_trackers():
    values = {"a": {"b": {"c": 1}}, "d": [1, 2], "e": None, "f": True}
    assert flat(values) == {"a.b.c": 1, "d": "[1, 2]", "e": "None", "f": True}
