"""Losses far above those before them."""

import json

import pytest
import torch

from training.run.loss_spikes import LossSpikeDetector
from training.run.run_logger import RunLogger


LOSSES = [2 + 0.1 * (-1) ** i for i in range(30)] + [float("nan"), 2.2, 4.0, 2.0]


def logged(step, loss):
    return {"step": step, "loss": loss, "logit_scale": 20.0, "grad_norm": 1.0}


@pytest.mark.parametrize("resumed_at", [0, 31])
def test_spike_is_reported_with_its_batch(tmp_path, resumed_at):
    """Also by a run that is resumed, which reads the losses before it in the log."""
    logger = RunLogger(tmp_path)
    for step, loss in enumerate(LOSSES[:resumed_at]):
        logger.append("metrics", logged(step, loss))
    detector = LossSpikeDetector(logger)
    sentences = {
        step: detector.check(logged(step, loss), torch.tensor([7, step]))
        for step, loss in enumerate(LOSSES)
        if step >= resumed_at
    }
    assert [step for step, sentence in sentences.items() if sentence] == [32]
    assert "Loss 4 at step 32 after 2.0" in sentences[32]
    (report,) = (json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").open())
    assert report["sample_ids"] == [7, 32] and report["step"] == 32
