"""Stopping a run from outside without losing a step."""

from __future__ import annotations

import signal
import threading

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def reset_sigchld_handler() -> None:
    """Undoes what torch does when data workers start: raise, wherever the main process is, when one is lost.

    In the middle of a step that would leave half of it done. The loader notices by itself when it waits for a batch.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class PreemptionHandler:
    """
    Within it, signals to stop are only noted; `wanted` says after a step whether any process was sent one.

    Data workers inherit the handlers when they are forked, and so outlive a signal to the whole group until the run is
    over. A second signal of the same kind has its usual effect.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.name = accelerator, "a signal to another process"
        self.noted = False

    def __enter__(self) -> PreemptionHandler:
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python has no handlers
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS} if in_main_thread else {}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.noted, self.name = True, signal.Signals(number).name
        signal.signal(number, self._before[number])

    def should_stop(self, waits_anyway: bool) -> bool:
        """Whether to stop, the same in every process: asked by all of them after every step.

        Several GPUs agree on it only at steps where the host waits for the device anyway.
        """
        if self.accelerator.num_processes == 1:
            return self.noted
        if self.accelerator.device.type != "cpu" and not waits_anyway:
            return False
        noted = torch.tensor(float(self.noted), device=self.accelerator.device)
        return self.accelerator.reduce(noted, reduction="sum").item() > 0
