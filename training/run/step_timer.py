"""Measure the time of steps between two lines of the log, without evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Time since the previous line of the log."""

    seconds: float
    steps: int
    data_wait_seconds: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def data_wait_fraction(self) -> float:
        return self.data_wait_seconds / self.seconds


class StepTimer:
    """Time the steps of an interval and the waiting for data in it."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._start, self._steps, self._data_wait = time.perf_counter(), 0, 0.0

    def count_step(self) -> None:
        """Count a finished step."""
        self._steps += 1

    def finish(self) -> Interval:
        """Return the interval so far and start a new one."""
        interval = Interval(time.perf_counter() - self._start, self._steps, self._data_wait)
        self.restart()
        return interval

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the interval."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
