"""The one schema: written, read again, and older files."""

import json

import pytest

from eval.models import ModelRecord
from eval.report import Metric, Report, TaskResult, print_report, print_table, read_evaluations, read_report
from modeling_amorlip.cli_amorlip import UserError


def make_report():
    scores = {"cosine": {"acc1": Metric(0.5, [0.4, 0.6]), "acc5": Metric(0.75)}, "amortized": {"acc1": Metric(0.6)}}
    cars = TaskResult("cars", "Cars", "x/cars", "test", "complete", "acc1", 8041, 8041, scores=scores)
    cars.random_score, cars.pixel_baseline, cars.unreadable = 0.005, 0.05, ["row 3 (cut off)"]
    pets = TaskResult("vtab/pets", "Pets", "x/pets", "test", "missing", "acc1", reason="there is no folder")
    model = ModelRecord("outputs/a", "abc", 12, "w", "p", "t")
    return Report(model, ["cosine", "amortized"], "f00", "2026-01-01", {"cars": cars, "vtab/pets": pets})


def test_report_survives_json(tmp_path):
    report = make_report()
    report.write(tmp_path / "new/r.json")
    assert read_report(tmp_path / "new/r.json") == report
    content = json.loads((tmp_path / "new/r.json").read_text())
    assert content["aggregates"]["vtab_13"]["complete"] is False and content["schema_version"] == 4
    rows = (tmp_path / "new/r.csv").read_text().splitlines()
    assert rows[0] == "task,status,scoring,metric,value,ci95_low,ci95_high,num_samples"
    assert rows[1:] == [
        "cars,complete,cosine,acc1,0.5,0.4,0.6,8041",
        "cars,complete,cosine,acc5,0.75,,,8041",
        "cars,complete,amortized,acc1,0.6,,,8041",
    ]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"r.json", "r.csv", "r.png"}


def test_interval_of_few_resamples_may_lie_beside_the_value(tmp_path):
    report = make_report()
    report.tasks["cars"].scores["cosine"]["acc1"] = Metric(0.5, [0.51, 0.6])
    report.write(tmp_path / "r.json", plot=True)
    assert (tmp_path / "r.png").stat().st_size > 0


def test_prints_tables(capsys):
    report = make_report()
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "cars acc1 50.00 40.00 - 60.00 60.00 8041 (nearest pixels: 5.00)"
    assert lines[2].endswith("missing: there is no folder")
    assert any(line.startswith("datacomp_38") and "incomplete: 37 tasks" in line for line in lines)
    print_table([report.tasks["cars"]])
    assert "acc5                            75.00     8041" in capsys.readouterr().out


def test_reads_schema_3(tmp_path):
    entry = {
        "title": "Cars",
        "dataset": {"name": "djghosh/wds_cars_test", "split": "test"},
        "status": "complete",
        "reason": None,
        "num_samples": 8041,
        "expected_samples": 8041,
        "main_metric": "acc1",
        "metrics": {"acc1": {"value": 0.5, "ci95": [0.4, 0.6]}},
        "scoring": {"gallery": {"acc1": {"value": 0.6, "ci95": None}}},
    }
    model = {"name": "a", "revision": "abc", "parameters": 12}
    content = {"schema_version": 3, "model": model, "code_version": "f", "created": "", "scoring": ["cosine"]}
    (tmp_path / "r.json").write_text(json.dumps({**content, "probes": [], "tasks": {"cars": entry}, "aggregates": {}}))
    result = read_report(tmp_path / "r.json").tasks["cars"]
    assert result.value == 0.5 and result.metrics["acc1"].ci95 == [0.4, 0.6] and not result.identity
    assert result.scores["exact"]["acc1"].value == 0.6  # by its present name
    assert result.hub_dataset == "djghosh/wds_cars_test"


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"schema_version": 9}', "schema_version is 9, this code reads 3 and 4"),
        ("[]", "is not what eval/run.py writes"),
        ("{", "is not what eval/run.py writes"),
        ('{"schema_version": 4}', "lacks what results hold: KeyError"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_report(tmp_path / "r.json")


def test_reads_lines_of_training(tmp_path):
    result = make_report().tasks["cars"]
    old = [{"task": "cars", "metric": m, "value": v, "num_samples": 8} for m, v in (("acc1", 0.25), ("acc5", 0.5))]
    lines = [{"step": 2, "results": old}, {"step": 4, "validation_loss": 1.5, "results": [result.to_dict()]}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_evaluations(tmp_path / "eval.jsonl")
    assert (first.step, first.validation_loss, first.results[0].value) == (2, None, 0.25)
    assert first.results[0].metrics["acc5"].value == 0.5 and first.results[0].num_samples == 8
    assert (second.step, second.validation_loss, second.results) == (4, 1.5, [result])
    (tmp_path / "eval.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="is not what training writes"):
        read_evaluations(tmp_path / "eval.jsonl")


def test_unwritable_output_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_report().write(tmp_path / "file/r.json")
