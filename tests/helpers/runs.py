"""What a training run left behind."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file


TIMES = ("samples_per_second", "step_time", "data_wait", "tflops_per_second", "mfu")


def read_metrics(folder, drop=TIMES):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def assert_same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
