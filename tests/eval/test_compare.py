"""Tables and plots of training runs beside each other."""

import json

import pytest

import eval.compare
from eval.compare import compare, draw
from eval.models import ModelRecord
from eval.report import Metric, Report, TaskResult
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.tasks import run_main


def make_result(**metrics):
    scores = {"cosine": {name: Metric(value) for name, value in metrics.items()}}
    return TaskResult("t", "T", "x/t", "test", "complete", "acc1", 4, 4, scores=scores)


def write_run(folder, objective, seed, **metrics):
    folder.mkdir()
    (folder / "run_config.yaml").write_text(f"arguments: {{objective: {objective}, seed: {seed}}}")
    line = {"step": 1, "results": [make_result(**metrics).to_dict()]}
    (folder / "eval.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "logit_scale": 14.0}\n' * 2)
    return folder


@pytest.fixture
def runs(tmp_path):
    values = (("amorlip", 0, 0.5), ("amorlip", 1, 0.7), ("clip", 0, 0.25))
    return [write_run(tmp_path / f"{o}_{seed}", o, seed, acc1=v, acc5=0.8, f1=0.1) for o, seed, v in values]


def test_tabulates_runs_over_seeds(runs, monkeypatch, capsys):
    assert run_main(monkeypatch, eval.compare, *runs, "--metrics", "acc1") == 0
    table = capsys.readouterr().out
    assert "| amorlip | 2 | 60.00 ± 14.14 |" in table and "| clip | 1 | 25.00 |" in table


def test_reads_runs_whose_settings_are_a_recipe(runs):
    (runs[2] / "run_config.yaml").write_text("{objective: siglip, seed: 3}")
    assert "| siglip | 1 | 25.00 |" in compare(runs, ["acc1"])


def test_refuses_what_cannot_be_compared(runs, tmp_path):
    for folders, metric, message in (
        (runs, "acc7", "has no acc7; its metrics are acc1"),
        ([runs[0], runs[0]], "acc1", "second run of amorlip with seed 0"),
        ([tmp_path], "acc1", "run_config.yaml is missing"),
    ):
        with pytest.raises(UserError, match=message):
            compare(folders, [metric])


def test_draws_runs_and_results(runs, tmp_path):
    draw([runs[0], runs[2]], tmp_path / "runs")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"differences.png", "radar.png", "curves.png"}
    files = []
    for name in ("a", "b"):
        report = Report(ModelRecord(name, None, 1), tasks={"t": make_result(acc1=0.5)})
        report.write(tmp_path / f"{name}.json")
        files.append(tmp_path / f"{name}.json")
    draw(files, tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"differences.png"}
    with pytest.raises(UserError, match="two runs or more"):
        draw(files[:1], tmp_path / "one")
