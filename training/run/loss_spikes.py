"""Report losses that lie far above those before them, with the batch that caused them."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor

from training.run.run_logger import RunLogger


MIN_LOSSES, MAX_LOSSES = 20, 50
"""Number of logged losses that a new one is compared with."""
THRESHOLD = 6.0
"""Standard deviations above the mean from which on a loss counts as a spike."""


class LossSpikeDetector:
    """Compare logged losses with the ones before them.

    Args:
        logger: logs of the run; `metrics` holds the losses of a resumed run, `loss_spikes` gets the spikes.
    """

    def __init__(self, logger: RunLogger):
        self.logger = logger
        self._losses: deque[float] | None = None

    def check(self, logged: dict[str, float], sample_ids: Tensor) -> str | None:
        """Return a sentence about a loss that is a spike and list it with its batch; None for any other loss."""
        if self._losses is None:
            previous = (json.loads(line)["loss"] for line in self.logger.lines("metrics"))
            self._losses = deque((loss for loss in previous if is_finite(loss)), MAX_LOSSES)
        loss, previous_losses = logged["loss"], list(self._losses)
        if not is_finite(loss):
            return None  # the step was skipped, which `NonFiniteGuard` counts
        self._losses.append(loss)
        if len(previous_losses) < MIN_LOSSES:
            return None
        mean, deviation = statistics.fmean(previous_losses), statistics.stdev(previous_losses)
        if loss <= mean + THRESHOLD * deviation:
            return None
        spike: dict[str, Any] = {name: logged[name] for name in ("step", "loss", "logit_scale", "grad_norm")}
        spike |= {"mean": mean, "standard_deviation": deviation, "sample_ids": sample_ids.tolist()}
        self.logger.append("loss_spikes", spike)
        return (
            f"Loss {loss:.4g} at step {logged['step']} after {mean:.4g} ± {deviation:.2g} "
            f"(gradient norm {logged['grad_norm']:.3g}, logit scale {logged['logit_scale']:.3g})."
        )


def is_finite(loss: float | None) -> bool:
    """Return whether a logged loss is a finite number; a log may hold null for one that is not."""
    return loss is not None and math.isfinite(loss)
