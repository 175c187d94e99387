"""Stop a run from outside without losing a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
"""Environment variables that torchrun and `accelerate launch` set for the processes that they start."""


def reset_sigchld_handler() -> None:
    """Remove the handler that torch installs when data workers start.

    It raises wherever the main process is when a worker is lost, which could leave a step half done. The loader
    notices a lost worker by itself when it waits for a batch.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class PreemptionHandler:
    """
    Note signals to stop, so that the run can save a checkpoint after the current step.

    Schedulers and launchers may send a signal twice, to the launcher and to its processes, and the launcher forwards
    it; so signals are noted for as long as the handler is active, however many there are. SIGQUIT (Ctrl-\\) ends a run
    at once. A launcher that was killed alone cannot forward anything: its processes notice that their parent has
    changed, and stop as well. Data workers inherit the handlers and outlive a signal to the whole process group.

    Args:
        accelerator: of the run; its processes agree on stopping.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.noted = False
        self.cause = "a signal to another process"
        """What stops the run, for messages."""
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None

    def __enter__(self) -> PreemptionHandler:
        in_main_thread = threading.current_thread() is threading.main_thread()  # Python has no handlers elsewhere
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS} if in_main_thread else {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted, self.cause = True, signal.Signals(number).name

    def should_stop(self, at_sync_point: bool) -> bool:
        """Return whether to stop, the same in every process; all of them must call this after every step.

        Args:
            at_sync_point: whether the host waits for the device at this step anyway. Several GPUs agree on stopping
                at such steps only.
        """
        if self._parent is not None and os.getppid() != self._parent and not self.noted:
            self.noted, self.cause = True, "the end of its launcher"
        if self.accelerator.num_processes == 1:
            return self.noted
        if self.accelerator.device.type != "cpu" and not at_sync_point:
            return False
        noted = torch.tensor(float(self.noted), device=self.accelerator.device)
        return self.accelerator.reduce(noted, reduction="sum").item() > 0


def resume_arguments(argv: list[str]) -> list[str]:
    """Return the command line that continues a run from its newest checkpoint."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--resume_from_checkpoint"):
            skip = word == "--resume_from_checkpoint"
            continue
        kept.append(word)
    return [*kept, "--resume_from_checkpoint", "latest"]
