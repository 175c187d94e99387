"""Timing of several implementations in turns, so that drifts of the machine affect all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup_rounds: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; a round makes every call once. Warm-up rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(warmup_rounds + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= warmup_rounds:
                seconds[name].append(time.perf_counter() - start)
    return seconds
