"""What an evaluator returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


Metrics = Callable[[np.ndarray], dict[str, float]]
"""Metrics over some samples, given their indices [n], which may repeat."""


@dataclass
class Scored:
    """A task's samples, scored in several ways.

    Args:
        num_samples: Number of samples that could be read.
        metrics: {scoring: metrics over chosen samples}.
        extra: Further metrics by cosine, over all samples.
        unreadable: Keys of samples that were left out, with the reason.
    """

    num_samples: int
    metrics: dict[str, Metrics]
    extra: dict[str, float] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
