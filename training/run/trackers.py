"""The experiment tracker that Accelerate logs to."""

from __future__ import annotations

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from modeling_amorlip.cli_amorlip import UserError
from training.config import unknown_name


def check_tracker(name: str) -> str | None:
    """Return Accelerate's `log_with` for `report_to`: a tracker's name, or None for "none".

    Raises:
        UserError: There is no such tracker, or it is not installed.
    """
    if name == "none":
        return None
    names = [str(tracker) for tracker in LoggerType.list()]
    if name not in names:
        raise UserError(unknown_name("tracker in report_to:", name, ["none", *names]))
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name == "all" and not installed:
        raise UserError("report_to is all, but no tracker is installed: install one, or set report_to none.")
    if name != "all" and name not in installed:
        raise UserError(f"report_to is {name}, which is not installed: pip install {name}, or set report_to none.")
    return name
