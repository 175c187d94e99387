"""Processes that share an evaluation: what they gather, send and agree on."""

import pytest
import torch

from eval.runner import evaluate_task
from eval.sharding import ProcessShard
from eval.tasks import select_tasks
from tests.helpers.checkout import run
from tests.helpers.models import make_model, save_model
from tests.helpers.tasks import read_json, write_classification


PROCESSES, SAMPLES, WIDTH = 3, 960, 256


def test_one_process_needs_no_process_group():
    shard, rows = ProcessShard(), torch.eye(3)
    assert shard.gather(rows) is rows and list(shard.take("abc")) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="mine"), shard.agreement():
        raise ValueError("mine")
    assert list(ProcessShard(1, 3).take("abcdef")) == ["b", "e"]


@pytest.mark.e2e
def test_processes_gather_tensors_and_agree_on_errors(demo_rows, tmp_path):
    pictures = [demo_rows[i]["image"].resize((8, 8)) for i in range(40)]
    names = ["heart", "star", "cat"]
    for name, number in (("small", 40), ("large", SAMPLES)):
        labels = [i % 3 for i in range(number)]
        write_classification(tmp_path / f"wds_{name}", [pictures[i % 40] for i in range(number)], labels, names)
    (tmp_path / "tasks.yaml").write_text(
        "first: {repositories: [x/wds_small]}\nbroken: {repositories: [x/wds_small]}\n"
        "absent: {repositories: [x/wds_none]}\nlast: {repositories: [x/wds_small], main_metric: acc5}\n"
        "large: {repositories: [x/wds_large]}\n"
    )
    folder = save_model(tmp_path / "model", projection_dim=WIDTH)
    command = ["tests/helpers/sharding.py", tmp_path / "out", folder, tmp_path / "tasks.yaml"]
    result = run(*command, launch=PROCESSES)
    assert result.returncode == 0, result.stderr
    reports = [read_json(tmp_path / f"out.{rank}") for rank in range(PROCESSES)]
    model, processor = make_model(projection_dim=WIDTH)
    values = {
        task.name: evaluate_task(model, processor, task, tmp_path, 64, resamples=0).value
        for task in select_tasks([str(tmp_path / "tasks.yaml")])
        if task.name not in ("broken", "absent")
    }
    for rank, report in enumerate(reports):
        assert report["rows"] == [[1.0, 1.0]] * 3 + [[2.0, 2.0]] * 6 and report["labels"] == [0, 0, 1]
        own = "ValueError" if rank == 0 else "RuntimeError"  # the process that failed keeps its own error
        assert report["errors"] == ["UserError: bad data", f"{own}: bug", "none"]
        assert report["tasks"].pop("broken") == "RuntimeError: this process alone failed"
        assert "no folder wds_none" in report["tasks"].pop("absent")
        assert report["tasks"] == values
    embeds = 4 * WIDTH * SAMPLES
    assert embeds <= sum(report["sent"] for report in reports) <= 1.2 * embeds
