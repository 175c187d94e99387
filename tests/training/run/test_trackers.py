"""A tracker that is mistyped or not installed is named before training starts."""

import pytest

from modeling_amorlip.cli_amorlip import UserError
from training.run import trackers
from training.run.trackers import check_tracker


def test_none_needs_no_tracker():
    assert check_tracker("none") is None


def test_mistyped_tracker():
    with pytest.raises(UserError, match="Unknown tracker in report_to: tensorbord: did you mean tensorboard?"):
        check_tracker("tensorbord")


def test_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    for name, message in (
        ("wandb", "report_to is wandb, which is not installed: pip install wandb"),
        ("all", "no tracker is installed"),
    ):
        with pytest.raises(UserError, match=message):
            check_tracker(name)


def test_installed_tracker(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [trackers.LoggerType.WANDB])
    assert check_tracker("wandb") == "wandb" and check_tracker("all") == "all"
