"""Lists of pairs that could not be used."""

import json

import pytest

from modeling_amorlip.cli_amorlip import UserError
from training.run.bad_samples import BadSampleLog, merge_bad_samples
from training.run.run_logger import RunLogger


def batch(size, *keys):
    return {
        "sample_ids": list(range(size)),
        "bad_samples": [{"key": key, "shard": "a.tar", "cause": "OSError", "reason": "cut"} for key in keys],
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fraction_counts_from_a_thousand_pairs(tmp_path):
    log = BadSampleLog(RunLogger(tmp_path), 0.002, rank=0, num_processes=1)
    log.record(batch(10, "x"), 1)
    log.record(batch(10), 2)
    log.record(batch(10, "y"), 3)
    with pytest.raises(UserError, match=r"3 pairs .*OSError 3.*0.002.* z of a.tar: cut.*bad_samples.jsonl"):
        log.record(batch(10, "z"), 4)
    assert [(line["step"], line["key"]) for line in lines(tmp_path / "bad_samples.jsonl")] == [
        (1, "x"),
        (3, "y"),
        (4, "z"),
    ]


def test_batch_that_cannot_be_filled_stops_at_once(tmp_path):
    log = BadSampleLog(RunLogger(tmp_path), 1.0, rank=0, num_processes=1)
    with pytest.raises(UserError, match="1 pairs could not be used"):
        log.record({"bad_samples": batch(0, "x")["bad_samples"]}, 1)


def test_processes_keep_lists_of_their_own_until_they_are_merged(tmp_path):
    logger = RunLogger(tmp_path)
    logs = [BadSampleLog(logger, 1.0, rank, num_processes=2) for rank in range(2)]
    logger.append("bad_samples", {"step": 1, "key": "from an earlier start"})
    for step, (first, second) in enumerate([("a", "b"), ("c", "d"), ("e", "f")], start=2):
        logs[0].record(batch(4, first), step)
        logs[1].record(batch(4, second), step)
    with (tmp_path / "bad_samples_1.jsonl").open("a") as file:
        file.write('{"step": 4, "ke')  # the process was killed
    merge_bad_samples(tmp_path, last_step=3)
    keys = [line["key"] for line in lines(tmp_path / "bad_samples.jsonl")]
    assert keys == ["from an earlier start", "a", "b", "c", "d"]
    assert [path.name for path in tmp_path.glob("bad_samples*")] == ["bad_samples.jsonl"]
    merge_bad_samples(tmp_path, last_step=1)
    assert len(lines(tmp_path / "bad_samples.jsonl")) == 5, "without lists of processes nothing changes"
